"""Tests the experiments at toy size.

Checks what they make, that they continue where they stopped, and what their tables show.
"""

import gzip
import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from scipy import stats

from experiments import (
    answering,
    jobs,
    oracle,
    real,
    stationary,
    students,
    tables,
    tuning,
    verdicts,
    writing,
)
from stanford_alpaca.bench.tables import bold
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation import intervals
from stanford_alpaca.evaluation.intervals import Difference, mean_of
from stanford_alpaca.losses import Objective, emo_loss
from stanford_alpaca.run.lock import locked

WORDS = (
    "the a old new king river said went saw and to of city house red small people year government "
    "president war peace"
).split()

QUICK = ("mle", "emo", "emo-identity")  # the arms of the parts at toy size


def write_texts(folder):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) + ".\n" for _ in range(600)]
    folder.mkdir(parents=True)
    with gzip.open(folder / "english.txt.gz", "wt") as file:
        file.writelines(lines)
    (folder / "wikitext2_valid.txt").write_text("".join(lines[:100]))
    return folder


@pytest.mark.skipif(importlib.util.find_spec("mauve") is None, reason="needs mauve-text")
def test_the_oracle_experiment_measures_every_student_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(oracle, "RESULTS", tmp_path)
    arguments = {
        "text_dir": str(write_texts(tmp_path / "texts")),
        "scale": "smoke",
        "work": str(tmp_path / "work"),
        "processes": 1,
    }
    oracle.run(**arguments)
    found = json.loads((tmp_path / "oracle-smoke.json").read_text())
    runs = {(run["setting"], run["arm"], run["seed"]): run["measures"] for run in found["runs"]}
    assert len(runs) == 2 + 2 * 2  # start, oracle, and two objectives with two seeds each
    truth = runs["80 sequences", "oracle", 0]
    assert truth["total_variation"] == truth["optimal_transport"] == 0
    assert truth["forward_cross_entropy"] == pytest.approx(truth["reverse_cross_entropy"])
    learned, start = runs["80 sequences", "mle", 0], runs["80 sequences", "start", 0]
    assert learned["forward_cross_entropy"] > truth["forward_cross_entropy"]
    assert learned["total_variation"] < start["total_variation"]
    assert runs["80 sequences", "emo", 0]["transport_cost"] != learned["transport_cost"]
    assert (tmp_path / "oracle-smoke.png").stat().st_size > 10_000
    (here,) = (tmp_path / "work").rglob("students")
    sets = [
        {tuple(row) for row in torch.load(here.parent / f"{name}.pt").tolist()}
        for name in ("corpus", "dev", "test")
    ]
    assert (
        [len(rows) for rows in sets] == [80, 8, 24]
        and not sets[0] & (sets[1] | sets[2])
        and not sets[1] & sets[2]
    )
    # Only the rate that did best on the development set is trained with the second seed.
    for objective in ("mle", "emo"):
        nll = {
            rate: json.loads((here / f"{objective}-80-{rate}-0" / "dev.json").read_text())
            for rate in ("0.001", "0.003")
        }
        best = min(nll, key=lambda rate: nll[rate]["dev_nll"])
        assert [folder.name for folder in here.glob(f"{objective}-*-1")] == [
            f"{objective}-80-{best}-1"
        ]
    capsys.readouterr()

    monkeypatch.setattr(students, "fit", None)  # nothing may be trained again
    (next((tmp_path / "work").rglob("measured/emo-80-*-1.json"))).unlink()
    oracle.run(**arguments)
    assert capsys.readouterr().out.count("making ") == 1
    assert json.loads((tmp_path / "oracle-smoke.json").read_text())["runs"] == found["runs"]


def test_tables_pair_by_seed_and_mark_what_is_clear():
    runs = [
        {"setting": "few", "arm": arm, "seed": seed, "measures": {"nll": value}}
        for arm, values in {
            "mle": [1.0, 2.0, 3.0],
            "emo": [0.8, 1.81, 2.79],
            "emd": [1.0, 1.0, 4.0],
        }.items()
        for seed, value in enumerate(values)
    ]
    assert "| mle | 2.0000 ± 1.0000 |" in tables.means(runs)
    rows = tables.differences(runs).splitlines()
    assert "| emo - mle | -0.2000 [-0.2248, -0.1752] * |" in rows
    assert "| emd - mle | +0.0000 [-2.4841, +2.4841] |" in rows
    assert bold({1e-4: 3.0, 1e-3: 1.0}) == ["0.0001: 3.0000", "**0.001: 1.0000!**"]
    assert bold({1e-4: 3.0, 1e-3: 1.0, 1e-2: 2.0})[1] == "**0.001: 1.0000**"
    runs.append({"setting": "few", "arm": "dft", "seed": 1, "measures": {"nll": 5.0}})
    runs.append({"setting": "few", "arm": "dft", "seed": 2, "measures": {"nll": 6.0}})
    # The pairs are seeds 1 and 2 of both arms.
    assert "| dft - mle | +3.0000 |" in tables.differences(runs).splitlines()


def test_objectives_come_to_rest_where_their_gradient_is_zero():
    log_q = (2 * torch.randn(3, 12)).log_softmax(1)
    cost = CostEmbedding(torch.randn(12, 4))
    prices = cost.costs(torch.arange(12), 12).expand(3, -1, -1)
    log_p, residual = stationary.descend(Objective("mle"), log_q, None, 300)
    assert residual.max() < 1e-5
    found = stationary.describe(log_q, log_p)
    assert found["tau"].tolist() == pytest.approx([1] * 3, abs=1e-3) and found["tv"].max() < 1e-5
    log_p, residual = stationary.descend(Objective("emo"), log_q, prices, 1000)
    assert residual.max() < 1e-3
    # the gradient of the expectation over targets, by the public loss
    z = log_p[0].double().requires_grad_()
    each = emo_loss(z.expand(12, -1), torch.arange(12), cost, reduction="none")
    (gradient,) = torch.autograd.grad((log_q[0].exp() * each).sum(), z)
    assert gradient.abs().sum() < 1e-3
    away = log_q[0].double().requires_grad_()
    each = emo_loss(away.expand(12, -1), torch.arange(12), cost, reduction="none")
    (gradient,) = torch.autograd.grad((log_q[0].exp() * each).sum(), away)
    assert gradient.abs().sum() > 0.05


def test_tau_is_that_of_equal_entropy():
    log_q = (2 * torch.randn(4, 30, dtype=torch.float64)).log_softmax(1)
    for tau in (0.5, 1.7):
        found = stationary.describe(log_q, (log_q / tau).log_softmax(1))
        assert found["tau"].tolist() == pytest.approx([tau] * 4, rel=1e-6)
        assert found["slope"].tolist() == pytest.approx([1 / tau] * 4)
        assert found["r2"].tolist() == pytest.approx([1] * 4) and found["tv_tau"].max() < 1e-6
    assert stationary.describe(log_q, log_q)["tv"].max() == 0


def test_real_models_leave_a_file_a_run_and_go_on(tmp_path, monkeypatch, make_model, root, capsys):
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results")
    for name, value in {"STEPS": 5, "TOP": 20, "CONTEXTS": 2, "LENGTH": 8}.items():
        monkeypatch.setattr(stationary, name, value)
    (tmp_path / "models").mkdir()
    for name in stationary.MODELS:
        (tmp_path / "models" / name).symlink_to(root / "data" / "tiny-base")
    write_texts(tmp_path / "data" / "text")
    arguments = {
        "models": str(tmp_path / "models"),
        "data": str(tmp_path / "data"),
        "work": str(tmp_path / "work"),
        "runs": str(tmp_path / "runs"),
    }
    real.run("E0", **arguments)
    found = json.loads((tmp_path / "results" / "real-E0.json").read_text())
    assert len(found["runs"]) == 2 * (4 + 4 * 4)
    assert (tmp_path / "results" / "real-E0.png").stat().st_size > 5000
    assert "| `emo` | centred |" in (tmp_path / "results" / "real-E0.md").read_text()
    (tmp_path / "runs" / "E0" / "smollm2-135m-emo2-identity.json").unlink()
    capsys.readouterr()
    real.run("E0", **arguments)
    assert capsys.readouterr().out.count("making ") == 1
    assert json.loads((tmp_path / "results" / "real-E0.json").read_text()) == found
    for changes, message in (({"models": "none"}, "has no smollm2"), ({"data": "none"}, "english")):
        with pytest.raises(UserError, match=message):
            real.run("E0", **arguments | changes)
    with pytest.raises(UserError, match="--part E9: choose from E0"):
        real.run("E9", **arguments)


@pytest.fixture
def toys(tmp_path, monkeypatch, root):
    """Returns the arguments of ``real.run`` for parts at toy size."""
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tuning, "ARMS", {name: tuning.ARMS[name] for name in QUICK})
    monkeypatch.setattr(tuning, "ONCE", {name: tuning.ONCE[name] for name in ("emd", "smoothing")})
    monkeypatch.setattr(tuning, "CHECKED", ("mle", "emo"))
    monkeypatch.setattr(tuning, "CONTROLS", {"emo": "emo-identity"})
    monkeypatch.setattr(writing, "PAIRS", [pair for pair in writing.PAIRS if {*pair} <= {*QUICK}])
    intervals._counts.cache_clear()
    monkeypatch.setattr(intervals, "RESAMPLES", intervals.AT_ONCE)
    for name, value in {
        "STEPS": 2,
        "BATCH": 2,
        "LENGTH": 32,
        "BLOCK": 16,
        "SEEDS": (0, 1, 2),
    }.items():
        monkeypatch.setattr(tuning, name, value)
    for name, value in {"PREFIXES": 24, "PREFIX": 4, "LENGTH": 6, "JUDGED": 12}.items():
        monkeypatch.setattr(writing, name, value)
    rng = random.Random(0)
    (tmp_path / "models").mkdir()
    for name in writing.MODELS:
        (tmp_path / "models" / name).symlink_to(root / "data" / "tiny-base")
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / tuning.TEXT[0]).write_text(
        "".join(
            f" = Article {n} = \n" + " ".join(rng.choices(WORDS, k=60)) + " .\n" for n in range(15)
        )
    )
    yield {
        "models": str(tmp_path / "models"),
        "data": str(tmp_path / "data"),
        "work": str(tmp_path / "work"),
        "runs": str(tmp_path / "runs"),
    }
    intervals._counts.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("mauve") is None, reason="needs mauve-text")
def test_tuned_models_are_compared_at_equal_entropy_and_write(toys, tmp_path, monkeypatch, capsys):
    real.run("E1", **toys)
    found = json.loads((tmp_path / "results" / "real-E1.json").read_text())
    rows = {(row["measure"], row["arm"]): row for row in found["rows"]}
    assert found["arms"]["mle"]["tau"] == pytest.approx([1] * 3, abs=1e-6)
    assert found["arms"]["emo"]["tau"][0] > 1  # it is surer than ``mle``
    assert list(rows["nll", "emo"]["minus"]) == ["mle", "emo-identity"]
    assert list(rows["nll", "emo-identity"]["minus"]) == ["mle"]
    assert rows["nll", "emo"]["verdict"] and not rows["nll", "emd"]["verdict"]
    assert rows["nll", "emo, rate 0.0015"]["minus"].keys() == {"mle, rate 0.0015"}
    assert found["afterwards"]["emo - mle"]["emo"][:3] == rows["emo", "emo"]["minus"]["mle"][:3]
    assert (tmp_path / "results" / "real-E1.png").stat().st_size > 5000
    kept = tmp_path / "runs" / "E1"
    runs = [json.loads((kept / f"{arm}-0.0005-0.json").read_text()) for arm in ("mle", "emo")]
    assert runs[0]["tokens"] == runs[1]["tokens"] and runs[0]["nll"] != runs[1]["nll"]

    (kept / "emd-0.0005-0.json").unlink()
    capsys.readouterr()
    taken = locked(kept / "emd-0.0005-0.taken")  # by another process; this one leaves it alone
    with taken, monkeypatch.context() as patch:
        patch.setattr(tuning, "load_for_generation", None)
        real.run("E1", **toys)
    assert "1 of 15 runs are being made" in capsys.readouterr().out
    real.run("E1", runs=toys["runs"], finished=True)
    assert "emd" not in json.loads((tmp_path / "results" / "real-E1.json").read_text())["arms"]

    real.run("E1-text", **toys)
    found = json.loads((tmp_path / "results" / "real-E1-text.json").read_text())
    assert found["taus"]["emo as emo"] == [1, 1, 1] and found["taus"]["mle as emo"][0] < 1
    rows = {(row["measure"], row["arm"]): row for row in found["rows"]}
    assert list(rows["mauve", "emo as emo"]["minus"]) == ["mle as emo", "emo-identity as emo"]
    with pytest.raises(UserError, match="E1 first"):
        real.run("E1-text", **toys | {"runs": str(tmp_path / "other")})


def test_plans_print_margins_beside_half_widths(toys, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "PILOT_STEPS", 1)
    monkeypatch.setattr(tuning, "PILOT_BLOCKS", 30)
    real.run("E1", **toys, plan=True)
    assert "| nll | 0.02 | " in capsys.readouterr().out
    with pytest.raises(UserError, match="E0 has no margins"):
        real.run("E0", **toys, plan=True)


def test_processes_share_jobs(tmp_path):
    made = []

    def slow(name):
        def job():
            made.append(name)
            if name == "a":  # meanwhile another process looks for work, and makes the rest
                with locked(tmp_path / "c.taken"):
                    jobs.make(others, tmp_path)
            return {"name": name}

        return job

    every = {name: slow(name) for name in "abc"}
    others = {name: every[name] for name in "bc"}
    jobs.make(every, tmp_path)
    assert made == ["a", "b", "c"]
    assert [run["name"] for run in jobs.read(every, tmp_path)] == ["a", "b", "c"]
    jobs.make(every, tmp_path)
    assert len(made) == 3


def test_verdicts_follow_the_rules():
    def found(low, high, p=0.01):
        return Difference((low + high) / 2, low, high, p)

    judge = verdicts.judge
    assert judge([found(0.1, 0.2), found(0.1, 0.3)], 0.05) == "seen"
    assert judge([found(0.01, 0.02), found(0.01, 0.04)], 0.05) == "seen, below the margin"
    assert judge([found(0.1, 0.2), found(-0.3, -0.1)], 0.05) == "inconclusive"
    assert judge([found(-0.01, 0.02, 0.4), found(0.01, 0.04)], 0.05) == "not seen"
    assert judge([found(-0.1, 0.2, 0.4), found(0.01, 0.04)], 0.05) == "inconclusive"
    assert judge([found(0.1, 0.2, 0.06)], 0.05) == "inconclusive"  # corrected
    assert judge([Difference(1, np.nan, np.nan, np.nan)], 0.05) == ""
    assert verdicts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_differences_cover_items_and_seeds():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 400))
    noise = rng.normal(scale=0.2, size=400)  # the same with each seed
    shifts = np.array([0.1, 0.2, 0.3])[:, None]
    ours, theirs = ([mean_of(row) for row in rows] for rows in (base + noise + shifts, base))
    one = verdicts.difference(ours, theirs)
    assert one.mean == pytest.approx(0.2 + noise.mean())
    error = np.sqrt(0.01 / 3 + 0.04 / 400)  # of seeds, of items
    freedom = 2 * (error**2 / (0.01 / 3)) ** 2
    half = stats.t.ppf(0.975, freedom) * error
    assert one.high - one.mean == pytest.approx(half, rel=0.05)
    seeds = verdicts.difference([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert (seeds.low, seeds.high) == pytest.approx((-0.0484, 0.4484), abs=1e-3)
    assert np.isnan(verdicts.difference([1.0, 2.0], [0.5, 1.0]).low)


def test_tau_is_fitted_on_one_half_and_measured_on_the_other(toys):
    """The curves say what a temperature does: those of a model at 0.5 give tau 2."""
    places = jobs.Places(*map(tuning.Path, toys.values()))
    run = tuning.measure(places, tuning.Tuned("mle", 5e-4, 0, 1))
    forced = tuning.forced_of(run)
    assert tuning.at_entropy(forced, forced, "temperature").value == pytest.approx(1, abs=1e-6)
    assert tuning.at_entropy(forced, forced, "nll").value == pytest.approx(
        np.mean([forced.nll[half::2].sum() / forced.tokens[half::2].sum() for half in (0, 1)]),
        rel=1e-6,
    )
    nll = tuning.at_best_tau(forced).value
    grid = forced.curve[:, :, 0].sum(0) / forced.tokens.sum()
    assert nll == pytest.approx(grid.min(), abs=0.05)


@pytest.fixture
def questions(toys, tmp_path, monkeypatch):
    """Returns the arguments of ``real.run`` for E3 at toy size."""
    rng = random.Random(0)
    for task, classes in {"trec": 6, "subj": 2}.items():
        for split, count in (("train", 30), ("test", 9)):
            file = tmp_path / "data" / "icl" / f"{task}_{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            rows = [
                {"text": " ".join(rng.choices(WORDS, k=5)), "label": i % classes}
                for i in range(count)
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = tmp_path / "data" / answering.GSM8K
    sums.parent.mkdir()
    sums.write_text(
        json.dumps(
            [
                {"instruction": f"Add 1 to {n}.", "input": "", "output": str(n + 1)}
                for n in range(20)
            ]
        )
    )
    monkeypatch.setattr(answering, "ARMS", {k: answering.ARMS[k] for k in QUICK})
    monkeypatch.setattr(answering, "CONTROLS", {"emo": "emo-identity"})
    monkeypatch.setattr(
        answering, "MARGINS", {"trec, 4": 2.0, "gsm8k, nll": 0.02, "gsm8k, costly mass": 0.01}
    )
    for name, value in {
        "COUNTS": (4, 8),
        "SEEN": 8,
        "BATCH": 4,
        "TRAINED": 8,
        "STEP": 4,
        "HELD_OUT": 6,
        "PILOT_ITEMS": 5,
        "SETTINGS": [("trec", 4), ("gsm8k", 8)],
        "TASKS": {"trec": answering.TASKS["trec"]},
    }.items():
        monkeypatch.setattr(answering, name, value)
    return toys


def test_answers_are_compared_by_setting_and_arm(questions, tmp_path, monkeypatch):
    real.run("E3", **questions)
    found = json.loads((tmp_path / "results" / "real-E3.json").read_text())
    assert found["items"] == {"trec": 9, "gsm8k": 6}
    rows = {(row["measure"], row["arm"]): row for row in found["rows"]}
    assert found["lower_rate"].keys() == {"trec, mle", "trec, emo"}
    assert len(rows) == 3 * 3 and all(row["seeds"] == 3 for row in rows.values())
    assert list(rows["trec, 4", "emo"]["minus"]) == ["mle", "emo-identity"]
    assert len({rows["gsm8k, nll", arm]["value"] for arm in QUICK}) == 3  # each trained otherwise
    before = {arm: found["gsm8k"][arm]["nll"] for arm in ("base", *QUICK)}
    assert rows["gsm8k, nll", "mle"]["value"] == pytest.approx(before["mle"], abs=1e-3)
    assert abs(rows["gsm8k, nll", "emo"]["value"] - before["emo"]) > 1e-3  # at mle's entropy
    assert len({*before.values()}) == 4
    with monkeypatch.context() as patch:
        patch.setattr(answering, "LIVE", "emo")  # it then has runs of GSM8K alone
        real.run("E3", runs=questions["runs"], finished=True)
    again = json.loads((tmp_path / "results" / "real-E3.json").read_text())["rows"]
    assert [row["arm"] for row in again if row["measure"] == "gsm8k, nll"] == list(QUICK)
    kept = tmp_path / "runs" / "E3"
    runs = [json.loads((kept / f"gsm8k-8-mle-{seed}.json").read_text()) for seed in (0, 1)]
    assert runs[0]["tokens"] == runs[1]["tokens"] and runs[0]["nll"] != runs[1]["nll"]
    assert not any((tmp_path / "work" / "E3" / "models").iterdir())
    (kept / "trec-4-emo-2.json").unlink()  # a seed counts when all arms have it
    real.run("E3", runs=questions["runs"], finished=True)
    found = json.loads((tmp_path / "results" / "real-E3.json").read_text())
    rows = {(row["measure"], row["arm"]): row for row in found["rows"]}
    assert [rows["trec, 4", arm]["seeds"] for arm in ("mle", "emo")] == [2, 2]
    assert rows["trec, 4", "mle"]["verdict"] == rows["trec, 4", "emo"]["verdict"] == ""
    for file in kept.glob("*-emo-identity-*.json"):
        file.unlink()
    with pytest.raises(UserError, match="no task of E3 has a seed of which all arms are finished"):
        real.run("E3", runs=questions["runs"], finished=True)
    with pytest.raises(UserError, match="E3 has no run of part E3"):
        real.run("E3", runs=str(tmp_path / "none"), finished=True)
    assert not (tmp_path / "none").exists()


def test_an_answer_is_right_if_it_is_the_class_in_words(questions, tmp_path, monkeypatch):
    places = jobs.Places(*map(tuning.Path, questions.values()))
    run = answering.Answered("trec", 4, "mle", 0)
    data = answering.write_data(places, run, tmp_path / "some")
    test = json.loads(data["test"].read_text())
    assert test[1]["output"] == "entity" and test[1]["instruction"].endswith("location or number?")
    assert len(json.loads(data["train"].read_text())) == 4
    monkeypatch.setattr(tuning, "load_for_generation", lambda source: (torch.nn.Identity(), None))
    monkeypatch.setattr(
        answering,
        "generate_batch",
        lambda model, tokenizer, records, *more, **options: [
            f" {record['output']}\n" if i else "number." for i, record in enumerate(records)
        ],
    )
    assert answering._right(tmp_path, data, None) == {"items": 9, "right": [0] + [1] * 8}
