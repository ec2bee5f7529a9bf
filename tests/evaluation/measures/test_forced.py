"""Teacher-forced measures equal plain computations."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.evaluation.measures.forced import BINS, Forced, teacher_forced
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.models.load import ModelSource


@pytest.mark.parametrize("family", [None, "gemma2", "cohere", "mixtral-routed"])
def test_the_numbers_and_that_batches_do_not_matter(root, tmp_path, exact, make_model, family):
    records = json.loads((root / "data" / "instructions" / "held_out.json").read_text())[:9]
    (tmp_path / "data.json").write_text(json.dumps(records))
    model, tokenizer = load_for_generation(ModelSource(str(root / "data" / "tiny-base")))
    if family is not None:
        model = make_model(family, vocab_size=2048, positions=512)
    examples, _ = tokenize_records(
        load_records(tmp_path / "data.json", str(tmp_path / "cache")), tokenizer, 512
    )
    embedding = model.lm_head.weight.detach()
    got = [
        teacher_forced(model, tokenizer, examples, CostEmbedding(embedding), batch_size=size)
        for size in (1, 4, 9)
    ]
    # The sums over each record's tokens, and each token's greatest probability with its hit.
    want, tops = [], []
    for example in examples:
        labels = torch.tensor(example["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        keep = labels != -100
        nll, emo, p, costs = exact(logits[keep], labels[keep], embedding)
        hits = p.argmax(1) == labels[keep]
        costly = (p * (costs >= costs.mean(1, keepdim=True))).sum(1)
        entropy = -(p * p.log()).sum(1)
        want.append([len(nll), nll.sum(), emo.sum(), hits.sum(), costly.sum(), entropy.sum()])
        tops += zip(p.max(1).values.tolist(), hits.tolist(), strict=True)
    want = np.array(want, dtype=float)
    for forced in got:
        names = ("tokens", "nll", "emo", "correct", "costly", "entropy")
        for name, column in zip(names, want.T, strict=True):
            assert getattr(forced, name) == pytest.approx(column, rel=1e-4, abs=1e-6), name
        measures = forced.measures()
        assert measures["perplexity"].value == pytest.approx(
            np.exp(want[:, 1].sum() / want[:, 0].sum()), rel=1e-4
        )
        assert measures["ece"].value == pytest.approx(plain_ece(*np.array(tops).T), abs=1e-5)
        assert measures["supervised_tokens"] == want[:, 0].sum() == forced.bins[..., 0].sum()


def plain_ece(top: np.ndarray, hit: np.ndarray) -> float:
    """Returns the calibration error by a loop over the bins, as the paper writes it."""
    bins = [(top > b / BINS) & (top <= (b + 1) / BINS) for b in range(BINS)]
    return sum(of.mean() * abs(hit[of].mean() - top[of].mean()) for of in bins if of.any())


def test_a_temperature_divides_the_logits_and_curves_have_several(make_model, exact):
    model = make_model("llama", initializer_range=0.3)
    embedding = model.lm_head.weight.detach()
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    examples = Dataset.from_dict({"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows]})
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    cost = CostEmbedding(embedding)
    found = teacher_forced(model, tokenizer, examples, cost, temperatures=(0.5, 1.0, 2.0))
    for place, temperature in enumerate((0.5, 1.0, 2.0)):
        alone = teacher_forced(model, tokenizer, examples, cost, temperature=temperature)
        for row, ids in enumerate(rows):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
            nll, emo, p, costs = exact(logits / temperature, torch.tensor(ids[1:]), embedding)
            costly = (p * (costs >= costs.mean(1, keepdim=True))).sum()
            want = [nll.sum(), emo.sum(), -(p * p.log()).sum(), costly]
            want = [value.item() for value in want]
            assert found.curve[row, place] == pytest.approx(want, rel=1e-4)
            got = [alone.nll[row], alone.emo[row], alone.entropy[row], alone.costly[row]]
            assert got == pytest.approx(want, rel=1e-4)


def test_calibration_error_by_hand():
    # Two records share the last bin: 3 of its 4 tokens are right, at a confidence of 0.95. The
    # other bin is exact.
    bins = np.zeros((2, BINS, 3))
    bins[0, 14], bins[1, 14], bins[1, 7] = [1, 0.95, 1], [3, 2.85, 2], [4, 2, 2]
    ones = np.ones(2)
    assert Forced(*[ones] * 6, bins).measures()["ece"].value == pytest.approx(4 / 8 * 0.2)


def test_a_record_without_a_target_counts_nothing_but_keeps_its_place(make_model):
    model, cost = make_model("llama"), CostEmbedding(None, "identity")
    # A row's first token is no target.
    examples = Dataset.from_dict(
        {
            "input_ids": [[], [5, 6, 7], [5, 6]],
            "labels": [[], [-100, 6, 7], [5, -100]],
        }
    )
    found = teacher_forced(model, type("Tokenizer", (), {"pad_token_id": 0}), examples, cost)
    assert found.tokens.tolist() == [0, 2, 0] and found.nll[[0, 2]].tolist() == [0, 0]
    # All tokens but the target cost 1, so both are sums of 1 - p_y.
    assert found.costly[1] == pytest.approx(found.emo[1], rel=1e-5) and found.emo[1] > 1.5
