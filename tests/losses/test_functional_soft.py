"""Soft targets through the public functions: which rows count, and what is refused.

A student that trains on them reaches its teacher.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from stanford_alpaca import Objective, SoftTargets, emo_loss, linear_emo_loss


@pytest.fixture
def batch():
    """Returns tensors of a batch, in which some targets are ignored.

    They are hidden states [3, 7, 10], weight [30, 10], targets [3, 7], embedding [30, 6] and soft
    targets [3, 7, 4].
    """
    targets = torch.randint(30, (3, 7))
    targets[0, :4] = targets[2] = -100
    soft = SoftTargets(torch.randint(30, (3, 7, 4)), torch.rand(3, 7, 4).softmax(-1))
    return torch.randn(3, 7, 10), torch.randn(30, 10), targets, torch.randn(30, 6), soft


def dense(soft: SoftTargets, vocab: int = 30) -> torch.Tensor:
    return torch.zeros(*soft.ids.shape[:-1], vocab).scatter_add_(-1, soft.ids, soft.probs)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_mle_is_cross_entropy_with_probabilities(batch, backend):
    hidden, weight, targets, _, soft = batch
    keep, logits = targets != -100, hidden @ weight.T
    want = cross_entropy(logits[keep], dense(soft)[keep], reduction="sum")
    for reduction, scale in (("mean", keep.sum()), ("sum", 1)):
        loss = linear_emo_loss(
            hidden, weight, targets, None, soft, mode="mle", reduction=reduction, backend=backend
        )
        torch.testing.assert_close(loss, want / scale, rtol=1e-5, atol=1e-5)
    loss = linear_emo_loss(
        hidden, weight, targets, None, soft, mode="mle", num_items=20, backend=backend
    )
    torch.testing.assert_close(loss, want / 20, rtol=1e-5, atol=1e-5)
    rows = linear_emo_loss(
        hidden, weight, targets, None, soft, mode="mle", reduction="none", backend=backend
    )
    assert rows.shape == targets.shape and (rows[~keep] == 0).all()
    torch.testing.assert_close(rows.sum(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        emo_loss(logits, targets, None, soft, mode="mle"), want / keep.sum(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["emo", "emo2", "emd", "mix"])
def test_linear_equals_emo_loss_of_the_logits(batch, mode):
    hidden, weight, targets, embedding, soft = batch
    hidden.requires_grad_(), weight.requires_grad_()
    logits_loss = emo_loss(hidden @ weight.T, targets, embedding, soft, mode=mode)
    want = torch.autograd.grad(logits_loss, [hidden, weight])
    for backend in ("reference", "chunked"):
        loss = linear_emo_loss(hidden, weight, targets, embedding, soft, mode=mode, backend=backend)
        torch.testing.assert_close(loss, logits_loss, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(loss, [hidden, weight]), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_targets_only_tell_which_positions_count_and_ignored_ones_may_hold_anything(batch):
    hidden, weight, targets, embedding, soft = batch
    ignored = targets == -100
    loss = linear_emo_loss(hidden, weight, targets, embedding, soft)
    hidden[ignored], soft.ids[ignored], soft.probs[ignored] = torch.nan, -5, torch.nan
    others = torch.where(ignored, -100, (targets + 1) % 30)
    torch.testing.assert_close(
        linear_emo_loss(hidden, weight, others, embedding, soft), loss, rtol=0, atol=0
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_probabilities_are_constants_divided_by_their_sum(batch, backend):
    hidden, weight, targets, embedding, soft = batch
    hidden.requires_grad_()
    loss = linear_emo_loss(hidden, weight, targets, embedding, soft, backend=backend)
    rounded = SoftTargets(soft.ids, (soft.probs * 1.0009).requires_grad_())
    again = linear_emo_loss(hidden, weight, targets, embedding, rounded, backend=backend)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    again.backward()
    assert rounded.probs.grad is None and hidden.grad is not None


def test_a_batch_without_targets_gives_zero(batch):
    hidden, weight, targets, embedding, soft = batch
    hidden.requires_grad_(), weight.requires_grad_()
    for backend in ("reference", "chunked"):
        loss = linear_emo_loss(
            hidden, weight, torch.full_like(targets, -100), embedding, soft, backend=backend
        )
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, [hidden, weight]):
            assert grad.abs().max().item() == 0


def test_autocast_uses_its_precision_for_the_output_layer_and_float32_for_the_rest(batch):
    hidden, weight, targets, embedding, soft = batch
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_emo_loss(hidden, weight, targets, embedding, soft)
    want = linear_emo_loss(hidden.bfloat16(), weight.bfloat16(), targets, embedding, soft)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, want)


def test_a_student_reaches_its_teacher_under_mle(batch):
    _, _, _, _, soft = batch
    logits = torch.zeros(3, 7, 30, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        emo_loss(
            logits, torch.zeros(3, 7, dtype=torch.long), None, soft, mode="mle", reduction="sum"
        ).backward()
        optimizer.step()
    torch.testing.assert_close(logits.softmax(-1), dense(soft), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "mode",
    [
        "tailr",
        "mixce",
        "dft",
        Objective("emo", emo_weighting="upstream"),
        Objective("emo2", emo_weighting="upstream"),
    ],
    ids=str,
)
def test_what_needs_the_probability_of_one_target_is_refused(batch, mode):
    hidden, weight, targets, embedding, soft = batch
    with pytest.raises(
        ValueError,
        match="needs the probability of one target: "
        "soft targets work with mle, emo, emo2, emd and mix",
    ):
        linear_emo_loss(hidden, weight, targets, embedding, soft, mode=mode)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, probs: (ids[:, :6], probs[:, :6]), r"\(3, 6, 4\) ids.*wanted \(3, 7, 'k'\)"),
        (lambda ids, probs: (ids, probs[..., :3]), r"\(3, 7, 4\) ids, \(3, 7, 3\) probs"),
        (lambda ids, probs: (ids[..., :0], probs[..., :0]), r"\(3, 7, 0\) ids"),
        (
            lambda ids, probs: (torch.full_like(ids, 30), probs),
            "soft target 30 is outside the vocabulary of 30",
        ),
        (lambda ids, probs: (torch.full_like(ids, -1), probs), "soft target -1 is outside"),
        (lambda ids, probs: (ids, probs * torch.nan), "not finite"),
        (lambda ids, probs: (ids, torch.tensor([1.5, -0.5, 0, 0]).expand(3, 7, 4)), "negative"),
        (
            lambda ids, probs: (ids, 0.9 * probs),
            "sum to 0.9, wanted 1: divide the top k by their sum",
        ),
        (lambda ids, probs: (ids.float(), probs), "integer ids"),
        (lambda ids, probs: (ids, ids), "floating"),
    ],
)
def test_bad_soft_targets(batch, change, message):
    hidden, weight, targets, embedding, soft = batch
    with pytest.raises(ValueError, match=message):
        linear_emo_loss(hidden, weight, targets, embedding, SoftTargets(*change(*soft)))
