"""The report's data: the sums of the transport view equal those of the float64 oracle.

Also tested are the choice of the best model, the curves, and the errors.
"""

import json
import re

import pytest
import torch

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.data.tokenize import ExampleEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.page import as_block
from stanford_alpaca.evaluation.page.curves import curves_of, shown_flags
from stanford_alpaca.evaluation.page.transport import view_of
from stanford_alpaca.evaluation.page.verdicts import better, table_of
from stanford_alpaca.evaluation.report import run, settings_of_runs, trained_on
from stanford_alpaca.evaluation.settings import Settings
from stanford_alpaca.evaluation.tables import short_names
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.models.load import ModelSource
from tests.helpers import refusal

RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue 🎈, or\n red </script>."},
    {
        "instruction": "Where is Olga?",
        "input": "Olga is in the school.",
        "output": "Olga is in the garden.",
    },
]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "held.json").write_text(json.dumps(RECORDS))
    return str(tmp_path / "held.json")


def measured(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def compared(mean, p):
    return {"mean": mean, "low": mean - 1, "high": mean + 1, "p": p}


def write_evaluation(folder, models, data="held.json"):
    """Writes what ``metrics --out`` writes, with made-up numbers.

    Each model is better than those before it.
    """
    folder.mkdir()
    results = {
        model: {"nll": measured(3.0 - i, 2.5 - i, 3.5 - i), "length": measured(4.0)}
        for i, model in enumerate(models)
    }
    pairs = [(b, a) for i, a in enumerate(models) for b in models[i + 1 :]]
    differences = [
        {"model": b, "minus": a, "measures": {"nll": compared(-1.0, 0.01)}} for b, a in pairs
    ]
    found = {
        "data": data,
        "records": 2,
        "settings": {"cost": None},
        "results": results,
        "differences": differences,
    }
    (folder / "metrics.json").write_text(json.dumps(found))
    rows = [
        {
            "instruction": r["instruction"],
            "input": r["input"],
            "reference": r["output"],
            "decoding": "greedy",
            "responses": {model: f"{model} {i}" for model in models},
        }
        for i, r in enumerate(RECORDS)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def block(page):
    """Returns the data that a page holds."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    )


def test_emo_of_a_token_is_the_sum_of_all_products_and_what_is_shown_adds_up_to_it(
    root, tmp_path, data, exact
):
    model, tokenizer = load_for_generation(ModelSource(str(root / "data" / "tiny-base")))
    embedding = model.lm_head.weight.detach()
    records = load_records(data, str(tmp_path / "cache"))
    encode = ExampleEncoder.as_trained(tokenizer, "alpaca", 512)
    view = view_of("base", model, tokenizer, records, CostEmbedding(embedding), encode, top=3)
    assert view["tokens"] == len(embedding)
    for record, tokens in zip(RECORDS, view["records"], strict=True):
        assert "".join(token["text"] for token in tokens) == record["output"]
        ids = [token["id"] for token in tokens]
        assert ids[-1] == tokenizer.eos_token_id and tokens[-1]["text"] == ""
        prompt = tokenizer(format_prompt(record))["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        nll, _, p, costs = exact(logits, torch.tensor(ids), embedding)
        for n, token in enumerate(tokens):
            assert token["nll"] == pytest.approx(nll[n].item(), rel=1e-4)
            assert token["emo"] == pytest.approx((p[n] * costs[n]).sum().item(), rel=1e-4)
            assert token["emo"] == pytest.approx(
                sum(q * c for _, q, c in token["top"]) + token["rest"][1], rel=1e-4
            )
            assert sum(q for _, q, _ in token["top"]) + token["rest"][0] == pytest.approx(
                1, abs=1e-5
            )
            assert [i for i, _, _ in token["top"]] == p[n].topk(3).indices.tolist()
            assert token["p"] == pytest.approx(p[n, ids[n]].item(), rel=1e-4)
            assert token["rank"] == (p[n] > p[n, ids[n]]).sum() + 1
            assert token["mean_cost"] == pytest.approx(costs[n].mean().item(), rel=1e-4)
            others = (
                costs[n].index_fill(0, torch.tensor([ids[n]]), torch.inf).topk(3, largest=False)
            )
            near = view["neighbours"][ids[n]]
            assert [c for _, c in near] == pytest.approx(others.values.tolist(), abs=1e-5) and near[
                0
            ][0] == others.indices[0]
    assert view["pieces"][ids[1]] == tokenizer.decode([ids[1]])
    with pytest.raises(UserError, match=r"^base: the cost embedding has 9 rows"):
        view_of("base", model, tokenizer, records, CostEmbedding(embedding[:9]), encode)


def test_the_best_is_the_one_that_beats_every_other_by_more_than_chance():
    assert [
        better(name)
        for name in ("rouge_l (greedy)", "nll", "oracle_perplexity", "length", "repetition_4")
    ] == [
        1,
        -1,
        -1,
        0,
        0,
    ]
    values = {"nll": [3, 2, 1], "emo": [3, 2, 1], "mauve": [1, 2, 9], "length": [1, 2, 3]}
    ps = {
        "nll": [0.9, 0.01, 0.01],
        "emo": [0.01, 0.01, 0.06],
        "mauve": [0.01, 0.01, 0.01],
        "length": [0.01, 0.01, 0.01],
    }
    pairs = [(1, 0), (2, 0), (2, 1)]
    models = ["a", "b", "c"]
    evaluation = {
        "results": {
            model: {name: measured(value[i]) for name, value in values.items()}
            for i, model in enumerate(models)
        },
        "differences": [
            {
                "model": models[m],
                "minus": models[n],
                "measures": {
                    name: compared(value[m] - value[n], ps[name][k])
                    for name, value in values.items()
                },
            }
            for k, (m, n) in enumerate(pairs)
        ],
    }
    table = table_of(evaluation, models)
    assert [row["best"] for row in table["rows"]] == [2, None, 2, None]
    assert table["pairs"] == [[1, 0], [2, 0], [2, 1]] and table["differences"][0]["cells"][
        1
    ] == compared(-2, 0.01)
    less = table_of(evaluation, ["a", "b", "not evaluated"])
    assert [row["best"] for row in less["rows"]] == [None, 1, 1, None] and less["pairs"] == [[1, 0]]
    assert less["rows"][0]["cells"] == [[3, None, None], [2, None, None], None]


def test_curves_are_read_from_a_finished_run_or_its_newest_checkpoint(tmp_path):
    def write(folder, history):
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))

    assert curves_of(str(tmp_path)) is None
    write(tmp_path / "out" / "checkpoint-5", [{"step": 5, "loss": 9.0}])
    history = [{"step": n, "loss": float(n)} for n in range(1, 1201)]
    write(
        tmp_path / "out" / "checkpoint-10",
        [*history, {"step": 7, "eval_nll": 2.0}, {"step": 8, "eval_nll": float("nan")}],
    )
    curves = curves_of(str(tmp_path / "out"))
    assert set(curves) == {"loss", "eval_nll"} and curves["eval_nll"] == [[7, 2.0]]
    assert (
        len(curves["loss"]) == 600
        and curves["loss"][:2] == [[2, 1.5], [4, 3.5]]
        and curves["loss"][-1] == [1200, 1199.5]
    )
    write(tmp_path / "out" / "x", [])
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"out/trainer_state.json: no training log \('log_history'\)"
    ):
        curves_of(str(tmp_path / "out"))


def test_runs_are_told_apart():
    assert short_names(["a/x/out", "b/x/out", "base/"]) == ["a/x/out", "b/x/out", "base"]
    flags = [
        {"mode": "emo", "seed": 1, "cost": "frozen"},
        {},
        {"mode": "mle", "seed": 2, "cost": "frozen"},
    ]
    assert shown_flags(flags) == [{"mode": "emo", "seed": 1}, {}, {"mode": "mle", "seed": 2}]


def test_the_command_writes_a_page_of_what_there_is(root, tmp_path, data, monkeypatch, capsys):
    base, out = str(root / "data" / "tiny-base"), tmp_path / "new" / "report.html"
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoint-2").mkdir(parents=True)
    (unfinished / "checkpoint-2" / "trainer_state.json").write_text(
        '{"log_history": [{"step": 2, "loss": 1.5}]}'
    )
    (unfinished / "run.yaml").write_text("mode: emo\neval_path: [elsewhere.json]\n")
    evaluation = write_evaluation(tmp_path / "ev", [base, "another"], data)
    run(base, str(unfinished), out=str(out), evaluation=evaluation, transport_records=1)
    found = block(out.read_text())
    assert [(r["name"], r["model"], r["curves"]) for r in found["runs"]] == [
        ("tiny-base", True, None),
        ("unfinished", False, {"loss": [[2, 1.5]]}),
    ]
    assert found["evaluation"]["rows"][0]["cells"] == [[3.0, 2.5, 3.5], None]
    assert [sample["responses"] for sample in found["samples"]] == [
        [f"{base} 0", None],
        [f"{base} 1", None],
    ]
    assert len(found["transport"]["records"]) == 1 and found["transport"]["runs"][1] is None
    assert f"report: {out}" in capsys.readouterr().out

    run(base, out=str(tmp_path / "own.html"), data=data, limit=1)
    found = block((tmp_path / "own.html").read_text())
    assert found["evaluation"]["records"] == 1 and len(found["samples"]) == 1
    assert found["evaluation"]["trained_on"] is False
    (tokens,) = found["transport"]["runs"][0]["records"]
    nll = next(row["cells"][0][0] for row in found["evaluation"]["rows"] if row["measure"] == "nll")
    assert nll == pytest.approx(sum(token["nll"] for token in tokens) / len(tokens), rel=1e-4)

    # No held-out records are known, so no model is loaded.
    run(base, str(unfinished), out=str(tmp_path / "curves.html"))
    found = block((tmp_path / "curves.html").read_text())
    assert found["evaluation"] is found["transport"] is None and found["runs"][1]["curves"] == {
        "loss": [[2, 1.5]]
    }
    assert "the page has the curves alone: train with --eval_path" in capsys.readouterr().out


def test_data_that_a_run_was_trained_on_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("data_path: [./a.json, tatsu-lab/alpaca]\n")
    assert trained_on("run", str(tmp_path / "a.json")) and trained_on("run", "tatsu-lab/alpaca")
    assert not trained_on("run", "b.json") and not trained_on("elsewhere", "a.json")


def test_the_data_cannot_leave_its_element():
    nasty = {"</script><b>": "<!--<script> & \u2028\u2029 \\u003c"}
    assert json.loads(as_block(nasty)) == nasty and not re.search(
        "[<>&\u2028\u2029]", as_block(nasty)
    )
    with pytest.raises(ValueError, match=r"^Out of range"):
        as_block({"nan": float("nan")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dat": "x"}, "unknown argument --dat; did you mean --data"),
        ({"out": None}, "give one or more runs and --out"),
        ({"out": "there.html"}, "there.html: give the name of a file that does not exist yet"),
        ({"out": "there.html/report.html"}, "there.html is a file"),
        ({"transport_records": -1}, "--transport_records -1"),
        ({"limit": 0}, "--limit 0"),
        ({"evaluation": "ev", "limit": 3}, "--limit is about an evaluation yet to be made"),
        ({"evaluation": "ev"}, "ev is not about .*tiny-base, only another"),
        ({"evaluation": "nothing"}, "--evaluation nothing: not what .* writes"),
        ({"data": "none.json"}, "none.json: no such file"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(
    root, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("old")
    write_evaluation(tmp_path / "ev", ["another"])
    call = {"out": "report.html"} | arguments
    status, line = refusal(
        capsys, monkeypatch, lambda: run(str(root / "data" / "tiny-base"), **call), tmp_path
    )
    assert status == 2 and re.search(message, line)


def test_runs_are_measured_as_they_were_trained(tmp_path):
    for name, length in (("a", 99), ("b", 99), ("c", 512)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(
            f"model_max_length: {length}\ncolumns: [output=answer]\n"
        )
    a, b, c = (str(tmp_path / name) for name in "abc")
    chosen = settings_of_runs("data.json", ["base", a, b], None)
    assert (chosen.prompt_template, chosen.max_length, chosen.columns) == (
        "auto",
        99,
        {"output": "answer"},
    )
    assert settings_of_runs("data.json", ["base"], 3) == Settings("data.json", limit=3)
    with pytest.raises(UserError, match=r"different --model_max_length \(99, 512\)"):
        settings_of_runs("data.json", [a, c], None)
