"""The evaluation command against plain computations."""

import json

import pytest
import torch

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.metrics import exact_match, format_table, run, teacher_forced
from stanford_alpaca.generate import load_for_generation


@pytest.fixture
def data(root, tmp_path):
    """Nine of the held-out records."""
    records = json.loads((root / "data" / "instructions" / "held_out.json").read_text())[:9]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


@pytest.mark.parametrize("family", [None, "gemma2", "cohere", "mixtral-routed"])
def test_teacher_forced_numbers_and_that_batches_do_not_matter(root, tmp_path, data, exact, make_model, family):
    model, tokenizer = load_for_generation(str(root / "data" / "tiny-base"))
    if family is not None:
        model = make_model(family, vocab_size=2048, positions=512)
    examples, _ = tokenize_records(load_records(data, str(tmp_path / "cache")), tokenizer, 512)
    embedding = model.lm_head.weight.detach()
    got = [teacher_forced(model, tokenizer, examples, CostEmbedding(embedding), batch_size=size) for size in (1, 4, 9)]
    nlls, emos, hits = [], [], []
    for example in examples:
        labels = torch.tensor(example["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        keep = labels != -100
        nll, emo, _, _ = exact(logits[keep], labels[keep], embedding)
        nlls.append(nll), emos.append(emo), hits.append((logits[keep].argmax(1) == labels[keep]).double())
    for result in got:
        assert result["supervised_tokens"] == len(torch.cat(nlls))
        assert result["nll"] == pytest.approx(torch.cat(nlls).mean().item(), rel=1e-4)
        assert result["emo"] == pytest.approx(torch.cat(emos).mean().item(), rel=1e-4)
        assert result["perplexity"] == pytest.approx(torch.cat(nlls).mean().exp().item(), rel=1e-4)
        assert result["token_accuracy"] == pytest.approx(torch.cat(hits).mean().item())


def test_the_command_writes_what_it_prints_and_overwrites_nothing(root, tmp_path, data, capsys):
    base = str(root / "data" / "tiny-base")
    run(base, data=str(data), out=str(tmp_path / "ev"), samples=2, max_new_tokens=8)
    results = json.loads((tmp_path / "ev" / "metrics.json").read_text())["results"][base]
    samples = [json.loads(line) for line in (tmp_path / "ev" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9
    responses, references = [s["responses"][base] for s in samples], [s["reference"] for s in samples]
    assert results["exact_match"] == exact_match(responses, references)
    shown = capsys.readouterr().out
    assert f"{results['nll']:.4f}" in shown and shown.count("instruction: ") == 2
    with pytest.raises(UserError, match="exists: give another --out"):
        run(base, data=str(data), out=str(tmp_path / "ev"))


def test_running_text_is_scored_in_blocks_and_asks_nothing(root, tmp_path, capsys):
    base, text = str(root / "data" / "tiny-base"), "The king of the north is old.\nHis river runs to the sea.\n" * 9
    (tmp_path / "text.txt").write_text(text)
    run(base, data=str(tmp_path / "text.txt"), max_length=64, out=str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"][base]
    model, tokenizer = load_for_generation(base)
    ids = torch.tensor([*tokenizer(text.rstrip("\n"))["input_ids"], tokenizer.eos_token_id])
    parts = [ids[start : start + 64] for start in range(0, len(ids) - 1, 63)]
    losses = [model(part[None], labels=part[None]).loss.item() * (len(part) - 1) for part in parts]
    assert found["supervised_tokens"] == len(ids) - 1
    assert found["nll"] == pytest.approx(sum(losses) / (len(ids) - 1), rel=1e-5) and "exact_match" not in found
    assert "1 document(s) of" in capsys.readouterr().out


def test_exact_match_and_table():
    assert exact_match([" a", "b", "c\n"], ["a", "x", "c"]) == pytest.approx(2 / 3)
    table = format_table({"base": {"nll": 2.0, "n": 1234}, "tuned": {"nll": 0.5, "n": 1234, "rate": 1000.4}})
    assert [line.split() for line in table.splitlines()] == [
        ["base", "tuned"], ["nll", "2.0000", "0.5000"], ["n", "1,234", "1,234"], ["rate", "-", "1,000"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dat": "x"}, "unknown argument --dat; did you mean --data"),
        ({}, "give one or more checkpoints and --data"),
        ({"data": "none.json"}, "no such file"),
        ({"data": "data.json", "limit": 0}, "--limit 0"),
        ({"data": "data.json", "batch_size": 0}, "--batch_size 0"),
        ({"data": "data.json", "cost": "no/such-model"}, "cannot load a model"),
    ],
)
def test_bad_arguments(root, tmp_path, data, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(str(root / "data" / "tiny-base"), **arguments)
