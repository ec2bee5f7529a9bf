"""The public functions: reductions, ignored targets and bad arguments.

They equal the authors' package where that is accurate.
"""

from types import SimpleNamespace

import pytest
import torch
from emo import EMOLoss
from torch.nn.functional import cross_entropy

from stanford_alpaca import Objective, emo_loss, linear_emo_loss
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import functional as linear


@pytest.fixture
def batch():
    """Returns hidden states [3, 7, 10], weight [30, 10], targets [3, 7] and embedding [30, 6].

    Some targets are ignored.
    """
    targets = torch.randint(30, (3, 7))
    targets[0, :4] = targets[2] = -100
    return torch.randn(3, 7, 10), torch.randn(30, 10), targets, torch.randn(30, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": 1, "ours": Objective("emo", emo_ratio_cap=3.0)},
        {"mode": 2, "ours": Objective("emo2")},
    ],
)
def test_equals_the_authors_package(options):
    logits = torch.randn(4, 9, 50).requires_grad_()
    labels = torch.randint(50, (4, 9))
    labels[:, :3] = -100
    embedding = torch.randn(50, 16)
    theirs = EMOLoss(logits, labels, embedding, mode=options["mode"])
    (their_grad,) = torch.autograd.grad(theirs, logits)
    ours = emo_loss(logits[:, :-1], labels[:, 1:], embedding, mode=options["ours"])
    (our_grad,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-7)


def test_the_authors_package_is_far_off_on_confident_tokens():
    logits = torch.randn(1, 9, 50)
    labels = torch.randint(50, (1, 9))
    logits[0, torch.arange(8), labels[0, 1:]] += 35
    embedding = torch.randn(50, 16)

    def gradient(loss, dtype):
        z = logits.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(z), z)[0].double()

    capped = Objective("emo", emo_ratio_cap=3.0)
    true = gradient(
        lambda z: emo_loss(z[:, :-1], labels[:, 1:], embedding.double(), mode=capped), torch.float64
    )
    theirs = gradient(lambda z: EMOLoss(z, labels, embedding), torch.float32)
    ours = gradient(
        lambda z: emo_loss(z[:, :-1], labels[:, 1:], embedding, mode=capped), torch.float32
    )
    assert (theirs - true).norm() / true.norm() > 0.1
    assert (ours - true).norm() / true.norm() < 1e-5


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_equals_emo_loss_of_the_logits(batch, reduction, backend):
    hidden, weight, targets, embedding = batch
    bias = torch.randn(30)
    results = []
    for fused in (True, False):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        if fused:
            loss = linear_emo_loss(
                h,
                w,
                targets,
                embedding,
                bias=b,
                softcap=5.0,
                logit_scale=0.5,
                reduction=reduction,
                backend=backend,
            )
        else:
            loss = emo_loss(
                5.0 * torch.tanh(0.5 * (h @ w.T + b) / 5.0), targets, embedding, reduction=reduction
            )
        results.append((loss, torch.autograd.grad((loss * loss.detach()).sum(), [h, w, b])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for ours, want in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4)


def test_reductions_follow_cross_entropy(batch):
    hidden, weight, targets, embedding = batch
    logits = hidden @ weight.T
    flat = (logits.flatten(0, 1), targets.flatten())
    for reduction in ("mean", "sum"):
        ours = emo_loss(logits, targets, None, mode="mle", reduction=reduction)
        torch.testing.assert_close(
            ours, cross_entropy(*flat, reduction=reduction), rtol=1e-5, atol=1e-5
        )
    rows = emo_loss(logits, targets, embedding, mode="mle", reduction="none")
    torch.testing.assert_close(
        rows.flatten(), cross_entropy(*flat, reduction="none"), rtol=1e-5, atol=1e-5
    )
    assert (rows[targets == -100] == 0).all()
    half = linear_emo_loss(hidden, weight, targets, None, mode="mle", num_items=20)
    torch.testing.assert_close(
        half, cross_entropy(*flat, reduction="sum") / 20, rtol=1e-5, atol=1e-5
    )


def test_a_batch_without_targets_gives_zero(batch):
    hidden, weight, targets, embedding = batch
    hidden.requires_grad_(), weight.requires_grad_()
    for backend in ("reference", "chunked"):
        loss = linear_emo_loss(
            hidden, weight, torch.full_like(targets, -100), embedding, backend=backend
        )
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, [hidden, weight]):
            assert grad.abs().max().item() == 0


def test_ignored_positions_may_hold_anything(batch):
    hidden, weight, targets, embedding = batch
    loss = linear_emo_loss(hidden, weight, targets, embedding)
    hidden[targets == -100] = torch.nan
    torch.testing.assert_close(linear_emo_loss(hidden, weight, targets, embedding), loss)


def test_autocast_uses_its_precision_for_the_output_layer_and_float32_for_the_rest(batch):
    hidden, weight, targets, embedding = batch
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_emo_loss(hidden, weight, targets, embedding)
    want = linear_emo_loss(hidden.bfloat16(), weight.bfloat16(), targets, embedding)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weights_multiply_the_losses(batch, reduction, dtype):
    hidden, weight, targets, embedding = batch
    hidden.requires_grad_()
    weights, count = torch.rand(3, 7), (targets != -100).sum()
    rows = linear_emo_loss(hidden, weight, targets, embedding, reduction="none") * weights
    want = {"mean": rows.sum() / count, "sum": rows.sum(), "none": rows}[reduction]
    (d_want,) = torch.autograd.grad(want.sum(), hidden)
    for loss in (
        linear_emo_loss(
            hidden, weight, targets, embedding, token_weights=weights.to(dtype), reduction=reduction
        ),
        emo_loss(
            hidden @ weight.T,
            targets,
            embedding,
            token_weights=weights.to(dtype),
            reduction=reduction,
        ),
    ):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), hidden)[0], d_want, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("on_gpu", "reason", "chosen"),
    [(True, None, "triton"), (True, "too old", "chunked"), (False, None, "chunked")],
)
def test_auto_takes_triton_on_a_gpu_that_it_serves(on_gpu, reason, chosen, monkeypatch):
    monkeypatch.setattr(linear.triton_kernels, "why_not", lambda hidden, weight: reason)
    assert linear._backend("auto", SimpleNamespace(is_cuda=on_gpu), None) is linear.BACKENDS[chosen]


def test_triton_is_refused_where_it_cannot_serve(batch, monkeypatch):
    monkeypatch.setattr(linear.triton_kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"backend triton cannot serve: .*; choose chunked"):
        linear_emo_loss(*batch, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((3, 7), 30)}, "target 30 is outside the vocabulary of 30"),
        ({"targets": torch.full((3, 7), -1)}, "target -1 is outside"),
        ({"targets": torch.zeros(3, 6, dtype=torch.long)}, r"wanted \(3, 7\)"),
        ({"cost_embedding": torch.randn(29, 6)}, "29 rows but there are 30 logits"),
        ({"cost_embedding": None}, "needs a cost embedding"),
        ({"weight": torch.randn(30, 11)}, "hidden has width 10"),
        ({"bias": torch.zeros(29)}, r"bias has shape \(29,\), wanted \(30,\)"),
        ({"bias": torch.zeros(1)}, r"bias has shape \(1,\), wanted \(30,\)"),
        ({"token_weights": torch.ones(3)}, r"token_weights have shape \(3,\), wanted \(3, 7\)"),
        (
            {"cost_embedding": "frozen"},
            "a tensor .vocabulary, width. or a CostEmbedding, not 'frozen'",
        ),
        ({"targets": torch.zeros(3, 7)}, r"targets are integers, not torch\.float32"),
        ({"targets": torch.ones(3, 7, dtype=torch.bool)}, r"targets are integers, not torch\.bool"),
        (
            {"targets": torch.zeros(3, 7, dtype=torch.complex64)},
            r"targets are integers, not torch\.complex64",
        ),
        (
            {"hidden": torch.zeros(3, 7, 10, dtype=torch.complex64)},
            r"floating-point numbers, not torch\.complex64",
        ),
        ({"hidden": torch.zeros(3, 7, 10, dtype=torch.long)}, r"numbers, not torch\.int64"),
        ({"num_items": 0}, "num_items is 0, wanted the number of targets, 1 or more"),
        ({"num_items": torch.tensor(-3)}, "num_items is -3"),
        ({"mode": "emo3"}, "unknown mode"),
        ({"reduction": "avg"}, "unknown reduction"),
        (
            {"backend": "cuda"},
            "unknown backend 'cuda': choose from auto, reference, chunked, triton",
        ),
    ],
)
def test_bad_arguments(batch, change, message):
    arguments = (
        dict(zip(("hidden", "weight", "targets", "cost_embedding"), batch, strict=True)) | change
    )
    with pytest.raises(ValueError, match=message):
        linear_emo_loss(**arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_targets_of_every_integer_dtype(batch, dtype):
    hidden, weight, targets, embedding = batch
    for backend in ("chunked", "reference"):
        want = linear_emo_loss(hidden, weight, targets, embedding, backend=backend)
        found = linear_emo_loss(hidden, weight, targets.to(dtype), embedding, backend=backend)
        assert torch.equal(found, want)


def test_cost_may_be_wider_and_is_not_trained(batch):
    hidden, weight, targets, _ = batch
    embedding = torch.randn(30, 64, requires_grad=True)
    hidden.requires_grad_()
    linear_emo_loss(hidden, weight, targets, embedding).backward()
    assert embedding.grad is None
    cost = CostEmbedding(embedding)
    torch.testing.assert_close(
        linear_emo_loss(hidden, weight, targets, cost),
        linear_emo_loss(hidden, weight, targets, embedding),
    )
