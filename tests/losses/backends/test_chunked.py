"""``chunked``: degenerate cases, what it computes and what it leaves out, precision and memory.

The modes and options are tested in test_backends.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import peak_tensors_mib
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import MODES, Objective
from stanford_alpaca.losses.backends import chunked, reference, torch_kernels
from stanford_alpaca.losses.types import Head


def run(
    backend, hidden, weight, bias, targets, cost, objective, reduction="sum", upstream=None, **head
):
    """Returns loss, statistics and the gradients of hidden, weight and bias."""
    leaves = [
        x.detach().clone().requires_grad_() if x is not None else None
        for x in (hidden, weight, bias)
    ]
    loss, stats = backend.linear_loss(
        leaves[0], Head(leaves[1], leaves[2], **head), targets, cost, objective, reduction
    )
    (loss if upstream is None else loss * upstream).sum().backward()
    return loss.detach(), stats, [x.grad for x in leaves if x is not None]


def assert_equal(one, two, rtol=2e-4, atol=2e-6):
    torch.testing.assert_close(one[0], two[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(one[1].nll, two[1].nll, rtol=rtol, atol=atol)
    if one[1].log_emo is not None:
        torch.testing.assert_close(one[1].log_emo.exp(), two[1].log_emo.exp(), rtol=rtol, atol=atol)
    for a, b in zip(one[2], two[2], strict=True):
        scale = b.abs().sum().item() / max(1, b.numel())
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol + 1e-4 * scale)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # A chunk has 16 rows of 50 logits, so there are several chunks and a remainder.
    monkeypatch.setitem(torch_kernels.CHUNK_LOGITS, "cpu", 16 * 50)


def problem(n=50, vocab=50, width=12):
    hidden, weight = torch.randn(n, width), torch.randn(vocab, width)
    return (
        hidden,
        weight,
        torch.randn(vocab),
        torch.randint(vocab, (n,)),
        CostEmbedding(torch.randn(vocab, 7)),
    )


def test_without_cost_and_without_bias():
    hidden, weight, _, targets, _ = problem()
    args = (hidden, weight, None, targets, None, Objective("mle"))
    result = run(chunked, *args)
    assert_equal(result, run(reference, *args))
    assert result[1].log_emo is None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(result[0], expected, rtol=1e-5, atol=0)


def test_duplicates_zero_rows_and_identity():
    hidden, weight, bias, targets, _ = problem()
    embedding = torch.randn(50, 7)
    embedding[3] = embedding[4]
    embedding[40:] = 0
    targets[:6] = torch.tensor([3, 4, 45, 49, 3, 4])
    for cost in (
        CostEmbedding(embedding),
        CostEmbedding(None, "identity"),
        CostEmbedding(torch.ones(50, 3)),
    ):
        args = (hidden, weight, bias, targets, cost, Objective("emo"))
        assert_equal(run(chunked, *args), run(reference, *args))


def test_no_tokens_give_zero_loss_and_zero_gradients():
    hidden, weight, bias, _, cost = problem()
    loss, stats, grads = run(
        chunked, hidden[:0], weight, bias, torch.empty(0, dtype=torch.long), cost, Objective("emo")
    )
    assert loss.item() == 0 and stats.nll.numel() == 0
    assert all(grad.abs().sum().item() == 0 for grad in grads)


def test_frozen_weight_gets_no_gradient_and_evaluation_none_at_all():
    hidden, weight, bias, targets, cost = problem()
    hidden.requires_grad_()
    loss, _ = chunked.linear_loss(
        hidden, Head(weight, bias), targets, cost, Objective("emo"), "sum"
    )
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        evaluated, _ = chunked.linear_loss(
            hidden, Head(weight, bias), targets, cost, Objective("emo"), "sum"
        )
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, loss.detach())


def test_bfloat16_error_is_that_of_pytorch_cross_entropy():
    hidden, weight, _, targets, cost = problem(n=200, vocab=50, width=64)
    hidden, weight = hidden / 4, weight / 4
    true = run(reference, hidden.double(), weight.double(), None, targets, cost, Objective("emo"))
    low = run(chunked, hidden.bfloat16(), weight.bfloat16(), None, targets, cost, Objective("emo"))

    def torch_error():
        def grads(dtype):
            h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
            torch.nn.functional.cross_entropy(
                (h @ w.T).float(), targets, reduction="sum"
            ).backward()
            return [h.grad.double(), w.grad.double()]

        return [
            (a - b).norm() / b.norm()
            for a, b in zip(grads(torch.bfloat16), grads(torch.float64), strict=True)
        ]

    for ours, want, allowed in zip(low[2], true[2], torch_error(), strict=True):
        assert (ours.double() - want).norm() / want.norm() <= 2 * allowed + 1e-6


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_is_frozen_costs_no_product(reduction, monkeypatch):
    hidden, weight, bias, targets, cost = problem()
    made, through_head = [], chunked._through_head
    monkeypatch.setattr(
        chunked, "_through_head", lambda *args: made.append(args[-1]) or through_head(*args)
    )
    for frozen in ((False, True, True), (True, False, True), (True, True, False)):
        leaves = [
            x.clone().requires_grad_(not still)
            for x, still in zip((hidden, weight, bias), frozen, strict=True)
        ]
        made.clear()
        loss, _ = chunked.linear_loss(
            leaves[0], Head(*leaves[1:]), targets, cost, Objective("emo"), reduction
        )
        loss.sum().backward()
        assert [x is None for x in (made[0].d_hidden, made[0].d_weight, made[0].d_bias)] == list(
            frozen
        )


def test_the_gradient_of_a_bfloat16_weight_is_accumulated_in_float32():
    hidden, weight, targets = (
        torch.randn(4000, 8).bfloat16(),
        torch.randn(50, 8).bfloat16() / 4,
        torch.randint(50, (4000,)),
    )
    (_, true), (_, ours) = (
        run(backend, hidden.to(dtype), weight.to(dtype), None, targets, None, Objective("mle"))[2]
        for backend, dtype in ((reference, torch.float64), (chunked, torch.bfloat16))
    )
    assert (ours.double() - true).norm() <= 5e-3 * true.norm()  # a sum over 250 chunks


def test_float16_keeps_its_range_for_the_scaled_gradient():
    hidden, targets = (
        torch.full((6000, 2), 15.0).half().requires_grad_(),
        torch.zeros(6000, dtype=torch.long),
    )
    weight = torch.zeros(50, 2, requires_grad=True)
    loss, _ = chunked.linear_loss(hidden, Head(weight), targets, None, Objective("mle"), "sum")
    # Before the division the sum is 88200, which float16 cannot hold.
    (d_weight,) = torch.autograd.grad(loss / 6000, weight)
    torch.testing.assert_close(d_weight[0], torch.full((2,), -14.7), rtol=1e-3, atol=0)

    hidden, weight = (
        torch.tensor([[18.0, 1.0]]).half().requires_grad_(),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    )
    loss, _ = chunked.linear_loss(hidden, Head(weight), targets[:1], None, Objective("mle"), "sum")
    # Without the scale the gradient is 4e-8, and float16 has only multiples of 6e-8 there.
    (d_hidden,) = torch.autograd.grad(loss * 65536, hidden)
    p = 65536 * torch.tensor(-17.0).sigmoid()
    torch.testing.assert_close(d_hidden.float(), torch.stack([-p, p])[None], rtol=1e-3, atol=0)


def test_second_derivatives_are_an_error_and_not_zero():
    hidden, weight, bias, targets, cost = problem()
    hidden.requires_grad_()
    for reduction in ("sum", "none"):
        loss, _ = chunked.linear_loss(
            hidden, Head(weight, bias), targets, cost, Objective("emo"), reduction
        )
        for value in (loss.sum(), loss.sum() * hidden.sum()):  # the first is dropped by autograd
            with pytest.raises(RuntimeError, match="create_graph=True is refused"):
                torch.autograd.grad(value, hidden, create_graph=True, retain_graph=True)


def test_evaluation_computes_no_gradient(monkeypatch):
    hidden, weight, bias, targets, cost = problem()
    hidden.requires_grad_()
    monkeypatch.setattr(torch_kernels.Chunk, "gradient", None)
    with torch.no_grad():
        chunked.linear_loss(hidden, Head(weight, bias), targets, cost, Objective("emo"), "sum")
    with pytest.raises(TypeError):
        chunked.linear_loss(hidden, Head(weight, bias), targets, cost, Objective("emo"), "sum")


def test_costs_are_computed_once_for_equal_targets(monkeypatch):
    hidden, weight, bias, _, cost = problem(n=64)
    targets, computed, compute = torch.tensor([7, 3, 9, 40]).repeat(16), [], cost._compute
    monkeypatch.setattr(
        cost, "_compute", lambda tokens: computed.extend(tokens.tolist()) or compute(tokens)
    )
    chunked.linear_loss(hidden, Head(weight, bias), targets, cost, Objective("emo"), "sum")
    assert computed == [3, 7, 9, 40]  # each target has 4 rows in each of 4 chunks


@pytest.mark.parametrize(("mode", "softcap"), [("mle", None), ("emo", None), ("emo", 5.0)])
def test_extra_memory_is_one_chunk_whatever_the_number_of_tokens(mode, softcap, monkeypatch):
    monkeypatch.setitem(torch_kernels.CHUNK_LOGITS, "cpu", 16 * 2000)
    monkeypatch.setitem(torch_kernels.SLICE_LOGITS, "cpu", 2000)
    weight, embedding = torch.randn(2000, 2, requires_grad=True), torch.randn(2000, 2)
    cost = CostEmbedding(embedding) if mode == "emo" else None

    def peak(n):
        hidden, targets = torch.randn(n, 2, requires_grad=True), torch.randint(2000, (n,))
        head = Head(weight, None, softcap)
        return peak_tensors_mib(
            lambda: chunked.linear_loss(hidden, head, targets, cost, Objective(mode), "sum")[0]
        )

    chunk_mib = 16 * 2000 * 4 / 2**20
    # The difference is 352 hidden states and their statistics.
    assert abs(peak(400) - peak(48)) < 0.3 * chunk_mib
    # Memory holds the logits, the costs, a block's scratch and the weight's gradient. A softcap
    # adds the slopes.
    assert peak(400) < (3 if softcap is None else 4) * chunk_mib


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    vocab=st.integers(2, 60),
    width=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 10**6),
)
def test_random_shapes_and_scales(n, vocab, width, scale, mode, seed):
    torch.manual_seed(seed)
    hidden, weight = (
        torch.randn(n, width, dtype=torch.float64),
        scale * torch.randn(vocab, width, dtype=torch.float64),
    )
    # The embedding has many duplicates and rows of zeros.
    embedding = torch.randint(-1, 2, (vocab, 3), dtype=torch.float64)
    args = (
        hidden,
        weight,
        None,
        torch.randint(vocab, (n,)),
        CostEmbedding(embedding),
        Objective(mode),
    )
    one, two = run(chunked, *args), run(reference, *args)
    assert all(torch.isfinite(g).all() for g in one[2])
    assert_equal(one, two, rtol=1e-8, atol=1e-10)
