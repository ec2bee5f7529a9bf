"""The Triton kernels equal a direct evaluation in float64, and they compile for GPUs.

They run on the CPU, in Triton's interpreter.
"""

import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compiled import compiling, disassembled
from stanford_alpaca.cost import CostRows
from stanford_alpaca.losses.types import Head
from tests.helpers import triton_kernels

triton = pytest.importorskip("triton", reason="triton is not installed")
# In Triton's interpreter numpy warns of log(0) and of overflows to -inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INF = torch.inf
FULL_HEAD = {"bias": True, "logit_scale": 1.7, "softcap": 5.0}


kernels = triton_kernels(interpret=True)
kernels.BLOCK = 16  # several blocks at tiny vocabularies


def exact_logits(product, head):
    """Returns z and dz/dproduct in float64."""
    x = product.double().requires_grad_()
    z = x if head.bias is None else x + head.bias.double()
    z = z if head.logit_scale is None else z * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z.detach(), torch.autograd.grad(z.sum(), x)[0]


def exact_gradient(z, slope, targets, costs, others, log_w, alpha, beta, g_y):
    """Returns the gradient of the product. Logits, others and log_w are relative to one number."""
    others, log_w, alpha, beta, g_y = (
        None if x is None else x.double()[:, None] for x in (others, log_w, alpha, beta, g_y)
    )
    g = torch.where(z > -INF, alpha * torch.exp(z - others), 0.0)
    if costs is not None:
        costly = (costs > 0) & (z > -INF)
        g += torch.where(costly, beta * torch.exp(z + costs.log() - log_w), 0.0)
    return g.scatter(1, targets[:, None], g_y) * slope


def check(product, targets, costs=None, head=None, raise_others=0.0, raise_log_w=0.0, below=0.0):
    """Compares ``statistics``, ``at`` and ``gradient`` with float64, and returns the statistics."""
    head, targets = head or Head(None), torch.as_tensor(targets)
    n, vocab = product.shape
    z, slope = exact_logits(product, head)
    c = None if costs is None else costs.table[costs.which].double()
    rest = z.scatter(1, targets[:, None], -INF)
    largest = z[z > -INF].abs().max().item() if (z > -INF).any() else 0.0
    # A head rounds the logits themselves.
    rounding = 1e-6 + 4 * torch.finfo(torch.float32).eps * largest * (head != Head(None))

    chunk = kernels.Chunk(product, head, targets, costs)
    ids = torch.randint(vocab, (n, 3))
    torch.testing.assert_close(chunk.at(ids).double(), z.gather(1, ids), rtol=1e-6, atol=rounding)
    gap, others, log_w = chunk.statistics()
    # All statistics are relative to the greatest other logit.
    top = rest.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    z, rest = z - top, rest - top
    torch.testing.assert_close(
        gap.double(), z.gather(1, targets[:, None]).squeeze(1), rtol=1e-6, atol=rounding
    )
    torch.testing.assert_close(others.double(), rest.logsumexp(1), rtol=1e-6, atol=rounding)
    assert (log_w is None) == (costs is None)
    if log_w is not None:
        torch.testing.assert_close(
            log_w.double(), (rest + c.log()).logsumexp(1), rtol=1e-6, atol=rounding
        )
        log_w = log_w + raise_log_w
    others = others + raise_others

    alpha, beta, g_y = torch.randn(3, n)
    beta = beta if log_w is None else torch.where(log_w == -INF, 0.0, beta)
    want = exact_gradient(z, slope, targets, c, others, log_w, alpha, beta, g_y)
    got = chunk.gradient(others, log_w, alpha, beta, g_y)
    assert got.dtype == product.dtype and got.data_ptr() == product.data_ptr()
    # Triton's interpreter truncates to bfloat16 where a GPU rounds. The terms of alpha and beta may
    # cancel, because the two may differ in sign.
    eps, cancels = (
        torch.finfo(got.dtype).eps,
        0.0 if costs is None else (alpha.abs() + beta.abs()).max().item(),
    )
    # The last term is the last digit of a logit that is so far below the others.
    rtol = 1e-5 + 4 * rounding + (eps if eps > 1e-6 else 0.0) + 1e-7 * below
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=rtol,
        atol=1e-37 + 1e-6 * cancels + (6e-8 if got.dtype == torch.float16 else 0),
    )
    return gap, others, log_w


def problem(dtype=torch.float32, vocab=37, n=5, cost_dtype=torch.float32, **form):
    """Returns a product of n rows, targets, costs of three rows with some zeros, and a head."""
    costs = torch.rand(3, vocab).to(cost_dtype)
    costs[:, ::5] = 0
    bias = torch.randn(vocab).to(dtype) if form.pop("bias", False) else None
    rows = CostRows(costs, torch.randint(3, (n,)))
    return (
        (3 * torch.randn(n, vocab)).to(dtype),
        torch.randint(vocab, (n,)),
        rows,
        Head(None, bias, **form),
    )


@pytest.mark.parametrize(
    "form", [{}, {"bias": True}, {"logit_scale": 0.3}, {"softcap": 2.0}, FULL_HEAD], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_head_and_precision(dtype, form):
    check(*problem(dtype, **form))


@pytest.mark.parametrize("cost_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_costs_of_other_precisions(cost_dtype):
    check(*problem(cost_dtype=cost_dtype))


def test_without_costs():
    product, targets, _, head = problem(**FULL_HEAD)
    check(product, targets, None, head)
    check(problem(torch.bfloat16)[0], targets)


def test_sums_from_outside():
    product, targets, costs, head = problem(**FULL_HEAD)
    check(product, targets, costs, head, raise_others=0.7, raise_log_w=2.0)


@settings(max_examples=25, deadline=None)
@given(
    vocab=st.integers(1, 50),
    n=st.integers(1, 4),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    masked=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    free=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_random_shapes_scales_and_masks(vocab, n, scale, masked, dtype, free, seed):
    torch.manual_seed(seed)
    product = (
        (scale * torch.randn(n, vocab)).to(dtype).masked_fill_(torch.rand(n, vocab) < masked, -INF)
    )
    costs = torch.rand(2, vocab).masked_fill_(torch.rand(2, vocab) < free, 0.0)
    check(
        product,
        torch.randint(vocab, (n,)),
        CostRows(costs, torch.randint(2, (n,))),
        below=8 * scale,
    )


def test_a_vocabulary_of_one_token():
    _, others, log_w = check(
        torch.randn(2, 1), [0, 0], CostRows(torch.ones(1, 1), torch.zeros(2, dtype=torch.long))
    )
    assert (others == -INF).all() and (log_w == -INF).all()


def test_no_rows():
    kernels.Chunk(
        torch.empty(0, 5), Head(None), torch.empty(0, dtype=torch.long), None
    ).statistics()


def test_where_nothing_costs_anything_or_can_be_reached():
    product, targets, costs, _ = problem(n=3)
    costs.table[0] = 0
    product[1, torch.arange(37) != targets[1]] = -INF
    product[2, costs.table[2] > 0] = -INF
    _, others, log_w = check(product, targets, CostRows(costs.table, torch.arange(3)))
    assert (log_w == -INF).all() and others.isinf().tolist() == [False, True, False]


def test_masked_blocks_and_targets():
    product = torch.randn(3, 60)
    product[0, :40] = product[1, 20:] = product[2, 7] = -INF
    costs = CostRows(torch.rand(1, 60), torch.zeros(3, dtype=torch.long))
    check(product.clone(), [3, 3, 7], costs)
    check(product, [3, 3, 7], costs, Head(None, softcap=4.0))  # the cap turns -inf into -4


def test_costly_tokens_a_hundred_nats_and_more_below_the_others():
    for gap in (100.0, 5000.0):
        product, targets, costs, _ = problem()
        product[:, costs.table[0] > 0] -= gap
        _, others, log_w = check(
            product, targets, CostRows(costs.table[:1], torch.zeros(5, dtype=torch.long)), below=gap
        )
        assert (log_w > -INF).all() and (others - log_w > 0.9 * gap).all()


def test_tiny_costs():
    product, targets, (table, which), _ = problem()
    check(
        product.clone(),
        targets,
        CostRows(torch.where(table > 0, 2e-38 + 1e-37 * table, 0.0), which),
    )
    chunk = kernels.Chunk(
        product, Head(None), targets, CostRows(torch.full_like(table, 1e-40), which)
    )
    _, others, log_w = chunk.statistics()  # a cost counts as 0 if 1 / c is not finite
    assert (log_w == -INF).all()
    assert chunk.gradient(others, others - 89, *torch.ones(3, 5)).isfinite().all()


def test_the_lowest_finite_logits_are_not_minus_infinity():
    product = torch.full((1, 40), torch.finfo(torch.float32).min)
    torch.testing.assert_close(check(product, [3])[1], torch.tensor([39.0]).log())


def test_the_cost_of_the_target_is_not_read():
    product, targets, costs, _ = problem(n=3)
    costs = CostRows(costs.table, torch.arange(3))
    before = kernels.Chunk(product, Head(None), targets, costs).statistics()
    costs.table.scatter_(1, targets[:, None], torch.tensor([[1e9], [3e38], [-0.5]]))
    after = kernels.Chunk(product, Head(None), targets, costs)
    torch.testing.assert_close(after.statistics(), before, rtol=0, atol=0)
    ones = torch.ones(3)
    assert torch.equal(
        after.gradient(*before[1:], ones, ones, 7 * ones).gather(1, targets[:, None]),
        7 * ones[:, None],
    )


def test_nan_is_not_hidden():
    product, targets, costs, _ = problem(n=2)
    product[0, (targets[0] + 1) % 37] = torch.nan
    _, others, _ = kernels.Chunk(product, Head(None), targets, costs).statistics()
    assert others.isnan().tolist() == [True, False]


def test_rows_of_a_wider_storage():
    wide, wide_costs = torch.randn(4, 50), torch.rand(2, 64)
    untouched = wide[:, 37:].clone()
    check(
        wide[:, :37],
        torch.randint(37, (8,))[::2],
        CostRows(wide_costs[:, :37], torch.randint(2, (8,))[::2]),
    )
    assert torch.equal(wide[:, 37:], untouched)


def test_vectors_that_are_not_contiguous():
    product, targets, _, _ = problem()
    one = kernels.Chunk(product.clone(), Head(None), targets, None)
    two = kernels.Chunk(product, Head(None), targets, None)
    _, others, _ = one.statistics()
    two.statistics()
    vectors = torch.randn(5, 2)
    expanded = torch.tensor(0.5).expand(5)
    want = one.gradient(others, None, vectors[:, 0].clone(), None, expanded.clone())
    assert torch.equal(two.gradient(others, None, vectors[:, 0], None, expanded), want)


def test_softcap_near_zero_and_far_out():
    """The relative errors of z and its slope stay those of float32.

    This holds even where 1 - exp(-2x) and 1 - tanh(x)^2 cancel.
    """
    x = torch.cat([torch.logspace(-7, 1.4, 24), -torch.logspace(-7, 1.4, 24)])[:, None]  # z / s
    product, head = torch.cat([1e4 * x, torch.full_like(x, -INF)], 1), Head(None, softcap=1e4)
    z, slope = exact_logits(product, head)[0], torch.cosh(x.double()) ** -2
    chunk = kernels.Chunk(product, head, torch.ones(48, dtype=torch.long), None)
    _, others, _ = chunk.statistics()
    torch.testing.assert_close(chunk.top.double(), z[:, 0], rtol=1e-6, atol=0)
    ones = torch.ones(48)
    got = chunk.gradient(others, None, ones, None, ones)
    torch.testing.assert_close(
        got.double(), torch.cat([slope, torch.zeros(48, 1)], 1), rtol=1e-5, atol=0
    )


def test_which_tensors_are_refused(monkeypatch):
    compiled, x = triton_kernels(interpret=False), torch.ones(2, 3)
    assert kernels.why_not(x, x) is None
    assert (
        kernels.why_not(x.double(), x)
        == "the hidden states are float64: the Triton kernels compute in float32"
    )
    assert "on cpu and the head is on cpu: Triton needs both on a GPU" in compiled.why_not(x, x)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert (
        triton_kernels(interpret=True).why_not(x, x)
        == "triton is not installed (builds of torch for CUDA bring it)"
    )


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_is_launched_compiles_without_spilling_registers(capability):
    module = triton_kernels(interpret=False)
    product, targets, costs, head = problem(
        torch.bfloat16, vocab=64, cost_dtype=torch.bfloat16, **FULL_HEAD
    )
    ones = torch.ones(5)
    with compiling(capability, module) as compiled:
        for arguments in ((product, Head(None), targets, None), (product, head, targets, costs)):
            chunk = module.Chunk(*arguments)
            chunk.statistics()
            chunk.gradient(ones, ones, ones, ones, ones)
            chunk._write_gradient(torch.zeros(64), ones, ones, ones, ones, ones)
    assert [kernel.name for kernel in compiled] == ["_statistics", "_gradient", "_gradient"] * 2
    # only the greatest entries take atomic operations: one of each of a thread's 8 columns
    found = [re.findall(r"\b(?:red|atom)\.\S+", k.asm["ptx"]) for k in compiled]
    assert [len(each) for each in found] == [0, 0, 8] * 2
    assert all("relaxed" in each and "max.s32" in each for each in found[2] + found[5])
    for kernel in compiled:
        assert re.search(r"arith.muli .* : i64", kernel.asm["ttir"])  # the row's offset has 64 bits
        # only the number of a block of columns is multiplied in 32 bits
        short = re.findall(r"arith.muli .* : i32", kernel.asm["ttir"])
        assert len(short) == ("gradient" in kernel.name)
        # The gradient is rounded to the nearest bfloat16.
        assert "gradient" not in kernel.name or "cvt.rn.bf16" in kernel.asm["ptx"]
        usage = disassembled(kernel, "-res-usage")
        assert f"{kernel.name}:" in usage and "STACK:0 " in usage and "LOCAL:0 " in usage
