"""What ``cost describe`` prints equals plain sums over all pairs and autograd's gradients."""

import numpy as np
import pytest
import torch

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost import description as module
from stanford_alpaca.cost.__main__ import look
from stanford_alpaca.cost.description import describe, gradients, pairs_of, tokens_of
from stanford_alpaca.errors import UserError
from stanford_alpaca.losses import Objective, emo_loss
from stanford_alpaca.models.load import ModelSource

V = 40


@pytest.fixture
def units():
    rows = torch.randn(V, 6, dtype=torch.float64) + torch.tensor([2.0, 0, 0, 0, 0, 0])
    rows[: V // 2, 1] += 3  # the frequent half is elsewhere
    return rows / rows.norm(dim=1, keepdim=True)


def test_moments_are_those_of_all_pairs(units):
    weights = torch.rand(V).double()
    weights /= weights.sum()
    order = torch.arange(V)
    found = pairs_of(units, weights, order)
    costs = (1 - units @ units.T).numpy()
    w = np.outer(weights, weights)
    mean = (w * costs).sum()
    variance = (w * (costs - mean) ** 2).sum()
    effect = (costs * weights.numpy()).sum(1) - mean  # what a token adds, whatever the other
    additive = effect[:, None] + effect[None]
    groups = [np.arange(start, start + V // 10) for start in range(0, V, V // 10)]
    between = 0
    for one in groups:
        for other in groups:
            part = w[np.ix_(one, other)]
            among = (part * costs[np.ix_(one, other)]).sum() / part.sum()
            between += part.sum() * (among - mean) ** 2
    assert found.mean == pytest.approx(mean)
    assert found.deviation == pytest.approx(variance**0.5)
    assert found.by_token == pytest.approx((w * additive**2).sum() / variance)
    assert found.by_frequency == pytest.approx(between / variance)


def test_gradients_are_autograds():
    logits = torch.randn(7, V, dtype=torch.float64, requires_grad=True)
    targets, cost = torch.randint(V, (7,)), CostEmbedding(torch.randn(V, 5).double())
    found = gradients(logits.detach().softmax(1), targets, cost)
    for got, mode in zip(found, ("emd", "emo"), strict=True):
        loss = emo_loss(logits, targets, cost, mode=Objective(mode), reduction="sum")
        (want,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_classes_frequencies_and_cosines_of_a_model(make_model, monkeypatch):
    monkeypatch.setattr(module, "PAIRS", 4000)
    model = make_model("llama", vocab_size=V, initializer_range=0.3)
    rows = [[1, 5, 6, 7], [1, 9, 3]]
    found, frequency = describe(model, rows)
    with torch.no_grad():
        p = torch.cat([model(torch.tensor([row])).logits[0, :-1].softmax(1) for row in rows])
    torch.testing.assert_close(frequency, p.double().mean(0), rtol=1e-5, atol=1e-8)
    costs = CostEmbedding(model.lm_head.weight).costs(torch.arange(V), V).double()
    order = frequency.argsort(descending=True)
    middle, rare = order[1:4], order[4:]
    cosine = found["cosine"]
    assert cosine.classes["frequent-frequent"] == pytest.approx(0, abs=1e-6)  # it is one token
    assert cosine.classes["middle-rare"] == pytest.approx(
        costs[middle][:, rare].mean().item(), abs=1e-6
    )
    pairs = costs[rare][:, rare].mean().item()
    assert cosine.classes["rare-rare"] == pytest.approx(pairs, abs=1e-6)
    assert cosine.drawn["uniform"].mean() == pytest.approx(cosine.uniform.mean, abs=0.03)
    assert found["shuffled"].uniform.mean == pytest.approx(cosine.uniform.mean, abs=1e-6)
    assert found["centred"].uniform.mean > cosine.uniform.mean - 0.05
    targets = torch.tensor([5, 6, 7, 9, 3])
    identity = CostEmbedding(None, "identity")
    one, other = (
        gradients(p.double(), targets, cost)
        for cost in (CostEmbedding(model.lm_head.weight), identity)
    )
    want = torch.cosine_similarity(one, other, dim=2).mean(1)
    assert [cosine.emo_term, cosine.mode_emo] == pytest.approx(want.tolist(), rel=1e-5)


def test_the_command(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "PAIRS", 2000)
    base, plot = str(root / "data" / "tiny-base"), tmp_path / "costs.png"
    look(base, tokens=" school, red", contexts=2, plot=str(plot))
    printed = capsys.readouterr().out
    assert "cosine  " in printed and "gradient of mode emo" in printed
    assert printed.count("nearest to ' school'") == 2 and "nearest to ' red'" in printed
    assert plot.stat().st_size > 5000
    look(base, text=str(root / "data" / "world.py"), contexts=2)  # any text will do
    assert capsys.readouterr().out.count("nearest to") == 12
    for flags, message in (
        ({"tokens": " unbelievableness"}, "is [0-9]+ tokens: give words of one token"),
        ({"plot": str(plot)}, "does not exist yet"),
        ({"text": "none.txt"}, "none.txt: no such file"),
        ({"contexts": 0}, "--contexts 0"),
    ):
        with pytest.raises(UserError, match=message):
            look(base, **flags)
    with pytest.raises(UserError, match="give a model"):
        look()
    tokenizer = ModelSource(base).tokenizer()
    assert tokenizer.decode(tokens_of(" red", tokenizer)) == " red"
