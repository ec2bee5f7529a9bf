"""The specification and ``chunked`` against the naive float64 oracle.

Values, gradients and degenerate cases are compared.
"""

import math

import pytest
import torch

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import Objective
from stanford_alpaca.losses.backends import chunked, reference
from stanford_alpaca.losses.backends.reference import token_stats
from stanford_alpaca.losses.types import Head


def confident(vocab: int, one_minus_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 logits [8, V] and targets [8] of about the probability 1 - one_minus_p."""
    logits = torch.randn(8, vocab)
    targets = torch.randint(vocab, (8,))
    rest = logits.double().scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    logits[torch.arange(8), targets] = (
        rest + math.log1p(-one_minus_p) - math.log(one_minus_p)
    ).float()
    return logits, targets


def gradients(objective: Objective, nll, emo, p, costs, targets) -> torch.Tensor:
    """Returns the gradient of the sum of the paper's losses, in float64.

    It is computed from d nll = p - 1[y] and d emo = p (c - emo).
    """
    hot = torch.nn.functional.one_hot(targets, p.shape[1]).double()
    others = (p * (1 - hot)).sum(1)
    d_nll = p * (1 - hot) - hot * others[:, None]
    d_emo = p * (costs - emo[:, None])
    if objective.mode == "emo":
        return 0.5 * (d_nll + (nll / emo)[:, None] * d_emo)
    if objective.mode == "emo2":
        return (emo / nll)[:, None] * d_nll + d_emo
    return d_emo


@pytest.mark.parametrize("one_minus_p", [0.9, 1e-2, 1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("mode", ["emo", "emo2", "emd"])
@pytest.mark.parametrize("backend", [reference, chunked], ids=["reference", "chunked"])
def test_gradient_given_float32_logits_is_exact_to_1e_5(exact, backend, mode, one_minus_p):
    vocab = 512
    embedding = torch.randn(vocab, 48)
    embedding[5] = embedding[6] = embedding[7]  # duplicates
    embedding[-3:] = 0  # a padded vocabulary
    logits, targets = confident(vocab, one_minus_p)
    targets_of_interest = [5, vocab - 1]
    # One target has duplicates, and the other one has a row of zeros.
    for row, y in enumerate(targets_of_interest):
        logits[row, [targets[row].item(), y]] = logits[row, [y, targets[row].item()]]
        targets[row] = y
    logits.requires_grad_()
    nll, emo, p, costs = exact(logits.detach(), targets, embedding)
    objective = Objective(mode)
    head = Head(torch.eye(vocab))  # logits @ identity is exactly the logits
    loss, stats = backend.linear_loss(
        logits, head, targets, CostEmbedding(embedding), objective, "sum"
    )
    loss.backward()
    want = gradients(objective, nll, emo, p, costs, targets)
    error = (logits.grad - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() <= 1e-5
    assert torch.allclose(stats.nll.double(), nll, rtol=1e-5, atol=0)
    assert torch.allclose(stats.log_emo.double().exp(), emo, rtol=1e-5, atol=0)


def test_the_published_formula_has_no_correct_digit_where_ours_is_exact(exact):
    logits, targets = confident(512, 1e-9)
    embedding = torch.randn(512, 48)
    _, emo, _, _ = exact(logits, targets, embedding)
    units = embedding / embedding.norm(dim=1, keepdim=True)
    published = 1 - (torch.softmax(logits, 1) @ units * units[targets]).sum(1)
    ours = token_stats(logits, targets, CostEmbedding(embedding)).log_emo.exp()
    assert ((published - emo).abs() / emo).max() > 1
    assert ((ours - emo).abs() / emo).max() < 1e-5


def test_duplicates_cost_exactly_nothing_whatever_their_length():
    # 1 - cos of equal directions is the noisiest for heavy tails.
    embedding = torch.randn(40, 3000) ** 5
    embedding = torch.cat([embedding, 0.37 * embedding])
    costs = CostEmbedding(embedding).costs(torch.arange(40), 80)
    assert (costs[:, 40:].diagonal() == 0).all() and (costs[:, :40].diagonal() == 0).all()
    assert (costs >= 0).all() and (costs > 0).sum() == 40 * 78


def test_costs_of_tiny_rows_and_under_autocast():
    embedding = torch.randn(60, 8)
    embedding[5] = embedding[6] + 1e-2 * torch.randn(8)
    # The squares underflow in float32, but the row still has a direction.
    embedding[7] = 1e-23 * torch.randn(8)
    units = embedding.double() / embedding.double().norm(dim=1, keepdim=True)
    want = 1 - units[[6, 7]] @ units.T
    with torch.autocast("cpu", torch.bfloat16):
        costs = CostEmbedding(embedding).costs(torch.tensor([6, 7]), 60)
    assert costs.dtype == torch.float32
    assert (costs.double() - want).abs().max() < 5e-7


def test_float64_logits_stay_float64(exact):
    logits = torch.randn(8, 64, dtype=torch.float64, requires_grad=True)
    targets, embedding = torch.randint(64, (8,)), torch.randn(64, 16, dtype=torch.float64)
    nll, emo, p, costs = exact(logits.detach(), targets, embedding)
    stats = token_stats(logits, targets, CostEmbedding(embedding))
    assert stats.nll.dtype == torch.float64
    assert torch.allclose(stats.nll, nll, rtol=1e-12)
    assert torch.allclose(stats.log_emo.exp(), emo, rtol=1e-12)
    stats.log_emo.exp().sum().backward()
    assert torch.allclose(
        logits.grad, gradients(Objective("emd"), nll, emo, p, costs, targets), atol=1e-12
    )


def test_all_mass_on_duplicates_gives_no_emo_and_no_emo_gradient():
    embedding = torch.ones(6, 4)  # every row is a duplicate of every other
    logits = torch.randn(3, 6, requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    stats = token_stats(logits, targets, CostEmbedding(embedding))
    assert (stats.log_emo == -torch.inf).all()
    Objective("emo")(*stats).sum().backward()
    half = logits.detach().clone().requires_grad_()
    mle = 0.5 * torch.nn.functional.cross_entropy(half, targets, reduction="sum")
    mle.backward()
    assert torch.allclose(logits.grad, half.grad, atol=1e-6)


def test_underflow_of_both_numbers_is_zero():
    logits = torch.zeros(1, 5)
    logits[0, 2] = 500.0  # 1 - p_y is about e^-500, which float32 cannot hold
    logits.requires_grad_()
    stats = token_stats(logits, torch.tensor([2]), CostEmbedding(torch.randn(5, 3)))
    for mode in ("emo", "emo2", "emd", "mix", "mle"):
        loss = Objective(mode)(*stats).sum()
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert loss.item() == 0
        assert grad.abs().max().item() == 0


def test_identity_cost_is_one_minus_p(exact):
    logits, targets = confident(200, 1e-3)
    stats = token_stats(logits, targets, CostEmbedding(None, "identity"))
    p = torch.softmax(logits.double(), 1)
    others = p.scatter(1, targets[:, None], 0.0).sum(1)
    assert torch.allclose(stats.log_emo.double().exp(), others, rtol=1e-5)
