"""The loss bench: its rule, what it refuses, and a whole comparison with a loss from a file."""

import json
import math
import shutil
from pathlib import Path

import pytest

from stanford_alpaca.bench import __main__ as bench
from stanford_alpaca.bench.__main__ import Options, compare, plan_of, run
from stanford_alpaca.bench.tables import differences_of, means_of, rates_of
from stanford_alpaca.bench.trials import Pool, Trial, best_rates, run_module, tried
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.page import as_block
from stanford_alpaca.flags import RECORD_LIMIT, command
from stanford_alpaca.run.where import Devices
from tests.helpers import refusal

OWN = Path(__file__).parents[1] / "losses" / "own_modes.py"


def trial(loss, rate, nll):
    return {"loss": loss, "learning_rate": rate, "seed": 0, "development_nll": nll}


def test_the_least_nll_on_the_development_set_is_chosen():
    trials = [trial("mle", 1e-3, 2.0), trial("mle", 2e-3, 1.0), trial("mle", 4e-3, 3.0)]
    trials += [
        trial("emo", 5e-4, math.nan),
        trial("emo", 1e-3, 1.5),
        trial("emo", 2e-3, 1.6),
        trial("emo", 4e-3, 1.7),
    ]
    assert best_rates(trials) == {"mle": 2e-3, "emo": 1e-3}
    assert rates_of(trials)[1:] == [
        ["mle", "0.001: 2.0000", "**0.002: 1.0000**", "0.004: 3.0000"],
        ["emo", "0.0005: nan", "**0.001: 1.5000**", "0.002: 1.6000", "0.004: 1.7000"],
    ]
    with pytest.raises(UserError, match="mle: nll on the development set is not finite"):
        best_rates([trial("mle", 1e-3, math.nan), trial("emo", 1e-3, 1.0)])
    assert rates_of([trial("mle", 1e-3, 1.0)])[1:] == [["mle", "**0.001: 1.0000**"]]
    # rates that differ in a late digit are different trials
    assert Trial("mle", 1e-3, 0).name != Trial("mle", 1.0000001e-3, 0).name


def test_differences_are_paired_by_seed():
    measured = {("mle", 0): 1.0, ("mle", 1): 2.0, ("emo", 0): 1.5, ("emo", 1): 2.7}
    runs = [
        {"arm": arm, "seed": seed, "measures": {"nll": value}}
        for (arm, seed), value in measured.items()
    ]
    assert means_of(runs) == [["", "nll"], ["mle", "1.5000 ± 0.7071"], ["emo", "2.1000 ± 0.8485"]]
    assert differences_of(runs, "mle") == [
        ["", "nll"],
        ["emo - mle", "+0.6000 [-0.6706, +1.8706]"],
    ]


def test_a_trial_is_trained_once(tmp_path):
    trained = []

    def train(folder):
        trained.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval_results.json").write_text('{"eval_nll": 1.5}')
        figures = {"train_runtime": 3.0, "train_peak_memory_mib": 7.0}
        (folder / "train_results.json").write_text(json.dumps(figures))
        (folder / "manifest.json").write_text("{}")

    one, run = Trial("emo, adaptive", 2e-5, 3), tmp_path / "runs" / "emo-adaptive-2e-05-3"
    run.mkdir(parents=True)
    (run / "eval_results.json").write_text('{"eval_nll"')  # of one that was killed
    first = tried(one, tmp_path, train)
    (tmp_path / "trials" / f"{one.name}.json").unlink()
    assert tried(one, tmp_path, train) == first  # killed after the training
    shutil.rmtree(tmp_path / "runs")  # the small file is enough
    assert tried(one, tmp_path, train) == first and trained == [run]
    assert (first["development_nll"], first["seconds"], first["seed"]) == (1.5, 3.0, 3)


def test_flags_of_training_arrive_from_a_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run", command(Options, seen.append))
    monkeypatch.setattr("sys.argv", ["compare", "--flags", "--max_steps 2 --lora", "--seeds", "7"])
    bench.main()
    assert (seen[0].flags, seen[0].seeds) == ("--max_steps 2 --lora", "7")


def test_each_thread_has_a_device_of_its_own():
    with Pool([{"GPU": "0"}, {"GPU": "1"}]) as pool:
        waiting = [pool.submit(lambda mine: mine["GPU"]) for _ in range(8)]
        assert {each.result() for each in waiting} <= {"0", "1"}


def test_processes_get_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setattr(bench.Devices, "found", lambda: Devices(2, True, 8))
    for visible, given in (("2, 3", ["2", "3", "2"]), ("", ["0", "1", "0"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = bench._devices(Options(processes=3))
        assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == given
    monkeypatch.setattr(bench.Devices, "found", lambda: Devices(0, False, 8))
    assert bench._devices(Options(processes=2)) == [{"OMP_NUM_THREADS": "4"}] * 2


def test_a_failure_is_told_with_its_log(tmp_path):
    with pytest.raises(UserError, match=r"json.tool ended with status \d+ \(.*No such file.*log"):
        run_module(tmp_path / "log.txt", ["json.tool", "none.json"], {})
    silent = ["timeit", "-n1", "-s", "import os; os._exit(9)"]
    with pytest.raises(UserError, match=r"timeit ended with status 9 \(it said nothing\)"):
        run_module(tmp_path / "log.txt", silent, {})


@pytest.fixture
def flags(root, tmp_path):
    records = json.loads((root / "data" / "instructions" / "train.json").read_text())
    for name, rows in (("train", records[:48]), ("held", records[48:60])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return {
        "loss": f"emo,{OWN}:mix",
        "model": str(root / "data" / "tiny-base"),
        "data": str(tmp_path / "train.json"),
        "eval_path": str(tmp_path / "held.json"),
        "out": str(tmp_path / "out"),
        "rates": "1e-3,2e-3",
        "seeds": "0,1",
        "max_new_tokens": 4,
        "transport_records": 2,
        "flags": "--max_steps 2 --global_batch 8 --save_strategy no",
    }


def pretended(words, started):
    """Writes what a module would write, with made-up numbers."""
    words = [str(word) for word in words]
    started.append(words)
    if words[0] == "stanford_alpaca.train":
        value = {name: words[words.index(f"--{name}") + 1] for name in ("learning_rate", "seed")}
        out = Path(words[words.index("--output_dir") + 1])
        nll = abs(float(value["learning_rate"]) - (2e-3 if "--loss" in words else 1e-3))
        figures = {"train_runtime": 2.0, "train_peak_memory_mib": 100.0}
        written = {"eval_results.json": {"eval_nll": nll}, "train_results.json": figures}
    else:
        out = Path(words[words.index("--out") + 1])
        names = words[1 : words.index("--data")]
        written = {"metrics.json": {"results": {name: {"nll": {"value": 1.0}} for name in names}}}
    out.mkdir(parents=True)
    for name, content in written.items():
        (out / name).write_text(json.dumps(content))


def test_all_get_the_same_trials_and_the_chosen_rates_all_seeds(flags, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(RECORD_LIMIT, "mib", 77)
    monkeypatch.setattr(bench, "run_module", lambda log, words, _: pretended(words, started))
    monkeypatch.setattr(bench.report, "collect", lambda options: {"runs": list(options.runs)})
    compare(Options(**flags))
    runs = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    assert runs == {"emo-0.001-0", "emo-0.001-1", "mix-0.002-0", "mix-0.002-1"}
    trained = [words for words in started if words[0] == "stanford_alpaca.train"]
    assert len(trained) == 6 and len(started) == 8
    assert {words[words.index("--max_record_mib") + 1] for words in started} == {"77"}
    for words in trained:  # all but loss, rate, seed and folder is the same
        for flag in ("--loss", "--mode", "--learning_rate", "--seed", "--output_dir"):
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        assert words == trained[0]
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["measures"]["seconds"] for run in found["runs"]] == [2.0] * 4
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("at an edge of those tried") == 2
    shutil.rmtree(tmp_path / "out" / "runs" / "mix-0.002-1")
    compare(Options(**flags))  # nothing is started again
    assert len(started) == 8
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 2\nglobal_batch: 8\nsave_strategy: 'no'\n")
    named = flags | {"flags": f"--config {recipe}"}
    assert plan_of(Options(**named)).options.flags == flags["flags"]
    recipe.write_text("max_steps: 3\n")  # what a file says counts, not its name
    with pytest.raises(UserError, match="has another comparison: flags differs"):
        plan_of(Options(**named))
    with pytest.raises(UserError, match="has another comparison: rates differs"):
        plan_of(Options(**flags | {"rates": "1e-3"}))
    with open(flags["eval_path"], "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="has another comparison: content of eval_path differs"):
        plan_of(Options(**flags))
    (tmp_path / "out" / "settings.json").write_text("[1")
    with pytest.raises(UserError, match=r"settings\.json: cannot be read"):
        plan_of(Options(**flags))


def test_a_comparison_ends_in_a_page_and_goes_on(flags, tmp_path, capsys):
    compare(Options(**flags))
    out, said = tmp_path / "out", capsys.readouterr().out
    found = json.loads((out / "compare.json").read_text())
    assert len(found["trials"]) == 4 and len(found["runs"]) == 4
    best = best_rates(found["trials"])
    kept = {f"{loss}-{best[loss]:g}-{seed}" for loss in ("emo", "mix") for seed in (0, 1)}
    assert {path.name for path in (out / "runs").iterdir()} == kept
    assert set(found["losses"]) == {"mix"} and (out / "losses" / "mix.py").exists()
    for each in found["runs"]:
        name = f"{each['arm']}-{best[each['arm']]:g}-{each['seed']}"
        measured = json.loads((out / f"evaluation-{each['seed']}" / "metrics.json").read_text())
        theirs = measured["results"][str(out / "runs" / name)]
        assert each["measures"]["nll"] == theirs["nll"]["value"]
    # the same batches: the first step, before any update, has the same nll
    first = [
        json.loads(
            (out / "runs" / f"{loss}-{best[loss]:g}-1" / "log.jsonl").read_text().split("\n")[0]
        )
        for loss in ("emo", "mix")
    ]
    assert first[0]["nll"] == pytest.approx(first[1]["nll"], rel=1e-6)
    page = (out / "compare.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [run["name"].split("-")[0] for run in data["runs"][1:]] == ["emo", "mix"]
    assert data["bench"]["tables"][0]["rows"][0][0] == "emo"
    assert len(data["transport"]["records"]) == 2 and as_block(data)
    assert "Minus emo, paired by seed" in said and "the code of this file runs" in said

    compare(Options(**flags))
    assert "training emo" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mle"}, "--loss mle: give two losses or more"),
        ({"loss": "mle,ml"}, "--loss ml: give FILE.py:NAME"),
        ({"loss": "mle,none.py:f"}, "none.py cannot be read"),
        ({"loss": f"mix,{OWN}:mix"}, "mix is there twice"),
        ({"model": None}, "give --model"),
        ({"rates": "1e-3,x"}, "--rates 1e-3,x: give numbers, with commas"),
        ({"seeds": "0,0"}, "--seeds 0,0: one is there twice"),
        ({"seeds": "-1"}, "--seeds -1: give a whole number from 0 on"),
        ({"development": 0.9}, "--development 0.9: give a number from 1e-06 to 0.5"),
        ({"development": 0}, "--development 0: give a number from 1e-06 to 0.5"),
        ({"development": 0.001}, "--development 0.001 of 48 records is none; give more"),
        ({"flags": "--x 'a"}, "--flags --x 'a: No closing quotation"),
        ({"flags": "--max_stepz 3"}, "unknown argument --max_stepz"),
        ({"data": "{tmp}/none.json"}, "none.json: no such file"),
        ({"eval_path": "{tmp}/none.json"}, "none.json: no such file"),
        ({"flags": "--seed 3"}, "--flags: --seed is set by the comparison"),
        ({"flags": "--config {tmp}/none.yaml"}, "none.yaml: cannot be read"),
        ({"flags": "--config {tmp}/recipe.yaml"}, "--flags: --mode is set by the comparison"),
        ({"out": "{tmp}"}, "is not empty, and no comparison"),
        ({"model": "{tmp}/none"}, "none"),
    ],
)
def test_what_cannot_be_is_told_before_a_step(
    flags, tmp_path, capsys, monkeypatch, changes, message
):
    (tmp_path / "recipe.yaml").write_text("max_steps: 2\nmode: emo\n")
    changed = flags | changes
    given = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changed.items()}
    status, line = refusal(capsys, monkeypatch, lambda: run(**given), tmp_path)
    assert status == 2 and message in line
