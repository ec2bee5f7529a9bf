"""The preview through a model: nll, emo and weights of records, suspicious labels, duplicates."""

import json
import math

import numpy as np
import pytest
import torch

from stanford_alpaca import emo_loss
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.duplicates import Asked, find_duplicates, jaccard, shingles_of
from stanford_alpaca.data.tokenize import ExampleEncoder
from stanford_alpaca.evaluation import data_view
from stanford_alpaca.evaluation.reading import (
    MEANING,
    WORDING,
    Reading,
    kinds_of,
    pull_on,
    read_with,
    suspicion_of,
    weights_of,
)
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.losses import Objective
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.preview import run
from tests.helpers import refusal

LONG = " ".join(f"word{i}" for i in range(60))
TRAIN = [
    {"instruction": "Name a colour.", "output": "Blue"},
    {"instruction": "Name  a COLOUR.", "output": "blue "},
    {"instruction": "Name a colour.", "output": "Red"},
    {"instruction": LONG, "output": "Yes."},
    {"instruction": "Say nothing.", "output": ""},
]
HELD = [
    {"instruction": "name a colour.", "output": "Red"},
    {"instruction": f"{LONG} too", "output": "Yes."},
    {"instruction": "Add 1 and 2.", "output": "3"},
]


def asked(records):
    return [Asked.of({"input": "", **r, "reference": r["output"]}) for r in records]


def reading(nll, emo, prompt=(1.0, 0.0)):
    return Reading([""] * len(nll), np.array(nll), np.array(emo), np.array(prompt))


def test_duplicates_within_and_between_files():
    found = find_duplicates({"train": asked(TRAIN), "held": asked(HELD)}, near=False)
    assert found.exact == [[("train", 0), ("train", 1)], [("train", 2), ("held", 0)]]
    (group,) = found.conflicting
    assert group == [("train", 0), ("train", 1), ("train", 2), ("held", 0)]
    assert found.near is None and found.overlap("held") == {"exact": 1, "near": None}


def test_near_duplicates_have_their_exact_similarity():
    pytest.importorskip("datasketch")
    found = find_duplicates({"train": asked(TRAIN), "held": asked(HELD)}, near=True)
    ((one, two, similarity),) = found.near
    assert (one, two) == (("train", 3), ("held", 1))
    # 57 runs of five words and 58, of which 56 are the same
    assert similarity == pytest.approx(56 / (57 + 58 - 56))
    assert found.overlap("held") == {"exact": 1, "near": 1}
    assert jaccard(shingles_of("a b"), shingles_of("a b")) == 1


def test_a_record_is_read_as_the_loss_reads_it(root):
    source = ModelSource(str(root / "data" / "tiny-base"))
    model, tokenizer = load_for_generation(source)
    encode = ExampleEncoder.of(tokenizer, "alpaca", 64)
    rows = [{"instruction": "Name a colour.", "input": "", "output": "Deep blue."}]
    empty = {"instruction": "Say nothing.", "input": "", "output": ""}
    cost = CostEmbedding(model.get_output_embeddings().weight)
    found, none = read_with(model, [rows[0], empty], cost, encode)
    assert none is None and "".join(found.texts) == "Deep blue."
    example = encode({name: [value] for name, value in rows[0].items()})
    ids, labels = (torch.tensor(example[name]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    for mode, values in (("mle", found.nll), ("emd", found.emo)):
        losses = emo_loss(logits, labels[0, 1:], cost, mode=mode, reduction="none")
        np.testing.assert_allclose(losses[labels[0, 1:] != -100], values, rtol=1e-4)
    assert found.ratio == pytest.approx(found.emo.sum() / found.nll.sum())


@pytest.mark.parametrize("mode", ["mle", "emo", "emo2"])
def test_the_pull_is_the_targets_gradient(mode):
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    targets, cost = torch.arange(5), CostEmbedding(torch.randn(9, 4, dtype=torch.float64))
    emo_loss(logits, targets, cost, mode=mode, reduction="sum").backward()
    nll, emo = (
        emo_loss(logits.detach(), targets, cost, mode=each, reduction="none")
        for each in ("mle", "emd")
    )
    pull = pull_on(reading(nll.numpy(), emo.numpy()), Objective(mode))
    np.testing.assert_allclose(pull, -logits.grad[range(5), range(5)].numpy(), rtol=1e-9)


def test_weights_are_shares_and_kinds_follow_distances():
    near, far = reading([4.0, 4.0], [0.2, 0.2]), reading([5.0], [0.9])
    sure = [reading([0.1], [0.05]) for _ in range(6)]
    rows = [near, far, *sure]
    assert kinds_of(rows) == [WORDING, MEANING, *[""] * 6]
    np.testing.assert_allclose(weights_of(rows, Objective("mle")), 1)
    weights = weights_of(rows, Objective("emo2"))
    pulls = [pull_on(row, Objective("mle")).sum() for row in rows]
    assert weights[0] < weights[1] < weights[2]
    assert (weights * pulls).sum() == pytest.approx(sum(pulls))
    # a token that the model is certain of pulls nothing, and has no NaN
    assert pull_on(reading([0.0], [0.0]), Objective("emo2")).tolist() == [0.0]


def test_a_label_is_suspicious_beside_similar_prompts_alone():
    make = np.random.default_rng(0)
    easy = [reading([1 + 0.1 * x], [0.1 + 0.01 * x], (1, 0.01 * x)) for x in make.normal(size=30)]
    hard = [reading([9 + 0.1 * x], [0.8 + 0.01 * x], (0, 0.01 * x)) for x in make.normal(size=30)]
    wrong = reading([9.0], [0.8], (1, 0))  # usual among the hard ones
    words = reading([9.0], [0.1], (1, 0))  # other words, the same meaning
    scores = suspicion_of([*easy, *hard, wrong, words])
    assert scores[60] > 20 and scores[61] < 3 and np.median(np.abs(scores[:60])) < 2
    assert suspicion_of([*easy[:5], wrong]).tolist() == [0.0] * 6


@pytest.fixture
def files(root, tmp_path):
    records = json.loads((root / "data" / "instructions" / "train.json").read_text())[:40]
    records[20] = {**records[20], "output": "zq xv 77 jj kk"}
    for name, rows in (("train", records), ("held", [records[3], *records[38:]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    flags = {"data": str(tmp_path / "train.json"), "eval_path": str(tmp_path / "held.json")}
    return flags | {"examples": 0, "cache_dir": str(tmp_path / "cache")}


def test_labels_of_a_few_records_are_not_called_clean(root, files, capsys):
    run(str(root / "data" / "tiny-base"), **files, transport=5)
    assert "suspicious labels: not among fewer than 24\n" in capsys.readouterr().out


def test_the_command_prints_and_writes_what_it_found(root, files, tmp_path, capsys, monkeypatch):
    real = data_view.importlib.util.find_spec
    monkeypatch.setattr(
        data_view.importlib.util,
        "find_spec",
        lambda name: None if name == "datasketch" else real(name),
    )
    written = {"out": str(tmp_path / "new" / "f.json"), "page": str(tmp_path / "new" / "f.html")}
    run(str(root / "data" / "tiny-base"), **files, transport=30, **written)
    said = capsys.readouterr().out
    assert "read 33 records" in said and data_view.NO_DATASKETCH in said
    assert "3 of 3 held-out records are in another file, too\n" in said
    assert "suspicious labels: 1 (nll and emo far above those of similar prompts)\n" in said
    found = json.loads((tmp_path / "new" / "f.json").read_text())
    (row,) = [r for r in found["records"] if r["record"] == 21 and "train" in r["source"]]
    assert row["suspicious"] and row["suspicion"] == max(r["suspicion"] for r in found["records"])
    tokens = row["tokens"]
    assert row["nll"] == pytest.approx(sum(t["nll"] for t in tokens) / len(tokens), rel=1e-4)
    assert tokens[0]["ratio"] == pytest.approx(tokens[0]["emo"] / tokens[0]["nll"], rel=1e-4)
    page = (tmp_path / "new" / "f.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    first = data["transport"]["records"][0]["instruction"]
    assert first.startswith(f"{tmp_path / 'train.json'}, record 21: ")
    ours = [[t["text"] for t in record] for record in data["transport"]["runs"][0]["records"]]
    assert "".join(ours[0]) == "zq xv 77 jj kk" and len(ours) == data_view.SHOWN
    shown = [data["records"]["rows"][i]["nll"] for i in data["records"]["shown"]]
    view = data["transport"]["runs"][0]["records"]
    for nll, record in zip(shown, view, strict=True):
        assert nll == pytest.approx(sum(t["nll"] for t in record) / len(record), rel=1e-3)
    assert not math.isnan(sum(shown))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transport": 0}, "--transport 0: give a whole number from 1 on"),
        ({"transport": None}, "--eval_path belongs to --transport N"),
        ({"transport": None, "eval_path": None, "out": "x"}, "--out belongs to --transport N"),
        ({"json": True}, "--json and --transport exclude each other"),
        ({"out": "{tmp}/train.json"}, "train.json"),
        ({"eval_path": "{tmp}/none.json"}, "none.json"),
        ({"eval_path": "{tmp}/train.json"}, "train.json is the data itself; give held-out data"),
    ],
)
def test_what_cannot_be(root, files, tmp_path, capsys, monkeypatch, changes, message):
    flags = {"transport": 5} | files | changes
    flags = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in flags.items()}
    model = str(root / "data" / "tiny-base")
    status, line = refusal(capsys, monkeypatch, lambda: run(model, **flags))
    assert status == 2 and message in line
