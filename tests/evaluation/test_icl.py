"""The few-shot command: its results follow from its predictions, and it refuses bad flags."""

import contextlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.prompting import Choices, split_stem
from stanford_alpaca.evaluation.fewshot.scoring import plain
from stanford_alpaca.evaluation.icl import join_models, run
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.models.load import ModelSource
from tests.helpers import refusal
from tests.ranks import run_ranks

TRAIN = {
    "rt": [
        ("a fine film", 1),
        ("dull and long", 0),
        ("a waste of time", 0),
        ("great fun for all", 1),
        ("not good", 0),
    ],
    "trec": [
        ("Who wrote it ?", 3),
        ("Where is Rome ?", 4),
        ("How many are there ?", 5),
        ("What is an atom ?", 2),
    ],
}
TEST = {
    "rt": [("great film", 1), ("dull film", 0), ("so long", 0)],
    "trec": [("Where is Paris ?", 4), ("Who is it ?", 3)],
}


def written(task: dict, text: str, label: int) -> str:
    return task["template"].format(text=text, label=task["classes"][label])


@pytest.fixture
def folder(tmp_path):
    """Writes two small tasks and returns their folder."""
    for name, sets in (("train", TRAIN), ("test", TEST)):
        for task, rows in sets.items():
            lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
            (tmp_path / f"{task}_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path)


@pytest.fixture
def base(root):
    return str(root / "data" / "tiny-base")


def results_of(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "results.json").read_text()), [json.loads(line) for line in lines]


def test_every_prediction_follows_from_what_is_written(folder, base, tmp_path, capsys):
    run(base, data_dir=folder, shots=2, retriever="tfidf", out=str(tmp_path / "out"))
    results, rows = results_of(tmp_path / "out")
    printed = capsys.readouterr().out
    assert (
        "the same for every seed, so there is one run" in printed
        and "2 examples by TF-IDF" in printed
    )
    assert [(row["task"], row["seed"], row["item"]) for row in rows] == [
        ("rt", None, 0),
        ("rt", None, 1),
        ("rt", None, 2),
        ("trec", None, 0),
        ("trec", None, 1),
    ]
    # Each example shares one word with the text, and the second example has fewer words.
    assert rows[0]["examples"] == [3, 0]
    model, tokenizer = load_for_generation(ModelSource(base))
    for row in rows:
        task = results["tasks"][row["task"]]
        shots = [written(task, *TRAIN[row["task"]][i]) for i in row["examples"]]
        prompts = [
            "\n\n".join([*shots, written(task, row["text"], label)])
            for label in range(len(task["classes"]))
        ]
        ids = tokenizer(prompts)["input_ids"]
        start = next(
            place
            for place in range(len(ids[0]))
            if len({tuple(row[: place + 1]) for row in ids}) > 1
        )
        (want,) = plain(model, [Choices(ids[0][:start], [row[start:] for row in ids], [])])
        assert row["scores"] == pytest.approx(want, abs=1e-4)
        assert row["prediction"] == int(np.argmax(row["scores"]))
    right = [row["prediction"] == row["label"] for row in rows]
    accuracy = results["accuracy"][base]
    assert accuracy["rt"] == [np.mean(right[:3])] and accuracy["trec"] == [np.mean(right[3:])]
    assert accuracy["mean of tasks"] == [
        pytest.approx((np.mean(right[:3]) + np.mean(right[3:])) / 2)
    ]
    assert f"{100 * accuracy['rt'][0]:.2f}" in printed
    with pytest.raises(UserError, match="does not exist yet"):
        run(base, data_dir=folder, out=str(tmp_path / "out"))


def test_seeds_pools_and_the_score_of_whole_prompts(folder, base, tmp_path, capsys):
    run(
        base,
        data_dir=folder,
        tasks="rt",
        shots=2,
        pool=3,
        retriever="model",
        seeds="4,5",
        score="perplexity",
        out=str(tmp_path / "out"),
        limit=2,
    )
    results, rows = results_of(tmp_path / "out")
    assert [(row["seed"], row["item"]) for row in rows] == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert len({index for row in rows[:2] for index in row["examples"]}) <= 3
    assert (
        "among 3 drawn records, scored by perplexity; seeds 4, 5, mean ± standard deviation"
        in capsys.readouterr().out
    )
    model, tokenizer = load_for_generation(ModelSource(base))
    task = results["tasks"]["rt"]
    shots = [written(task, *TRAIN["rt"][i]) for i in rows[0]["examples"]]
    prompts = [
        "\n\n".join([*shots, f"Review: great film\nSentiment: {name}"])
        for name in ("negative", "positive")
    ]
    for text, score in zip(prompts, rows[0]["scores"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert score == pytest.approx(-model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def run_script(script: Path, flags: list[str], printed: Path) -> None:
    """Runs ``python icl.py`` in a process that has already imported everything."""
    sys.argv = [str(script), *flags]
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")


def test_two_models_from_the_top_level(root, folder, base, make_model, tmp_path):
    other = tmp_path / "other"
    make_model("gpt2", vocab_size=2048, positions=256).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(base, pad_token=None)
    tokenizer.save_pretrained(other)
    flags = [
        "--model_path",
        base,
        f"--model_path={other}",
        "--data_dir",
        folder,
        "--shots=2",
        "--retriever",
        "random",
        "--seeds",
        "0,1",
        "--out",
        str(tmp_path / "out"),
    ]
    run_ranks(1, run_script, root / "icl.py", flags, tmp_path / "printed", launched=False)
    results, rows = results_of(tmp_path / "out")
    assert [row["model"] for row in rows] == [base] * 10 + [str(other)] * 10
    assert [row["examples"] for row in rows[:10]] == [row["examples"] for row in rows[10:]]
    shots = [written(results["tasks"]["rt"], *TRAIN["rt"][i]) for i in rows[10]["examples"]]
    texts = [
        "\n\n".join([*shots, written(results["tasks"]["rt"], "great film", label)])
        for label in (0, 1)
    ]
    context, endings = split_stem(tokenizer(texts)["input_ids"], 0)
    (want,) = plain(AutoModelForCausalLM.from_pretrained(other), [Choices(context, endings, [])])
    # No pad token was added, which would take probability from the others.
    assert rows[10]["scores"] == pytest.approx(want, abs=1e-5)
    compared = results[f"against {base}"][str(other)]
    accuracy = {name: results["accuracy"][name]["rt"] for name in (base, str(other))}
    assert compared["rt"]["mean"] == pytest.approx(
        np.mean(accuracy[str(other)]) - np.mean(accuracy[base])
    )
    printed = (tmp_path / "printed").read_text()
    assert "other against tiny-base, paired bootstrap" in printed and "±" in printed


def test_without_an_encoder_it_says_what_it_takes(folder, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    run(base, data_dir=folder, tasks="rt", shots=1, limit=1, out=str(tmp_path / "out"))
    assert "examples are chosen by TF-IDF: --retriever sentence needs" in capsys.readouterr().out
    assert results_of(tmp_path / "out")[0]["settings"]["retriever"] == "tfidf"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shot": 3}, "unknown argument --shot; did you mean --shots"),
        ({"model_path": None}, "give a model: --model_path MODEL"),
        ({"model_path": "no/such/folder/here"}, "cannot load a model"),
        ({"tasks": "rtt"}, "--tasks rtt: no such task; did you mean rt"),
        ({"tasks": "subj"}, "subj_train.jsonl: no such file"),
        ({"retriever": "tfdif"}, "did you mean tfidf"),
        (
            {"retriever": "sentence", "encoder": "none/none"},
            "--encoder none/none: cannot be loaded",
        ),
        ({"score": "loss"}, "--score loss: there is none"),
        ({"shots": 6}, "--shots 6: task rt has 5 to choose from"),
        ({"shots": -1}, "--shots -1"),
        ({"pool": 2, "shots": 3}, "--shots 3: task rt has 2"),
        ({"pool": 9}, "--pool 9: task rt has 5"),
        ({"pool": 3, "retriever": "random"}, "random draws from all"),
        ({"seeds": "0,x"}, "--seeds 0,x: give whole numbers"),
        ({"seeds": "1,1"}, "stands there twice"),
        ({"limit": 0}, "--limit 0"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"data_dir": "nowhere"}, "--data_dir nowhere: no such folder"),
        ({"templates": "nowhere"}, "--templates nowhere: no such folder"),
    ],
)
def test_bad_flags(folder, base, tmp_path, capsys, monkeypatch, flags, message):
    options = {
        "model_path": base,
        "data_dir": folder,
        "tasks": "rt",
        "shots": 2,
        "retriever": "tfidf",
    } | flags
    status, line = refusal(
        capsys, monkeypatch, lambda: run(out=str(tmp_path / "out"), **options), tmp_path
    )
    assert status == 2 and message in line


def test_a_model_may_be_given_again():
    assert join_models(["--limit", "3", "--model_path", "a", "--model-path=b"]) == [
        "--limit",
        "3",
        "--model_path=a\nb",
    ]
    assert join_models(["--help"]) == ["--help"]
