"""Every backend equals the float64 reference, through the public function.

Hidden states and weights are rows of the identity or small whole numbers. Their products are exact
in float32, in any order of summation, so the logits of all backends are the same. What is compared
is what each backend computes from them.
"""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stanford_alpaca import linear_emo_loss
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import MODES, Objective, SoftTargets
from stanford_alpaca.losses import functional as linear
from stanford_alpaca.losses.backends import chunked, torch_kernels
from tests.helpers import triton_kernels

BACKENDS = ["reference", "chunked", "triton"]
SOFT_MODES = ("mle", "emo", "emo2", "emd", "mix")
# In Triton's interpreter numpy warns of log(0) and of overflows to inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def small_chunks_and_interpreted_kernels():
    interpreted = triton_kernels()
    if interpreted.triton is None:
        pytest.skip("triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # A chunk has 16 rows of 20 logits, so there are several chunks and a remainder.
        patch.setitem(torch_kernels.CHUNK_LOGITS, "cpu", 16 * 20)
        patch.setitem(torch_kernels.SLICE_LOGITS, "cpu", 5 * 20)
        patch.setattr(interpreted, "CHUNK_LOGITS", {"cuda": 16 * 20})
        patch.setattr(interpreted, "BLOCK", 16)
        patch.setattr(linear, "triton_kernels", interpreted)
        patch.setitem(linear.BACKENDS, "triton", partial(chunked.linear_loss, kernels=interpreted))
        yield


def loss_and_gradients(dtype, hidden, weight, targets, cost, soft=None, upstream=None, **options):
    """Returns the loss and the gradients of hidden states, weight and any bias, in float64."""
    leaves = [
        x.detach().to(dtype).requires_grad_()
        for x in (hidden, weight, options.pop("bias", None))
        if x is not None
    ]
    bias = leaves[2] if len(leaves) == 3 else None
    loss = linear_emo_loss(leaves[0], leaves[1], targets, cost, soft, bias=bias, **options)
    grads = torch.autograd.grad(
        loss if upstream is None else (loss * upstream.to(loss.dtype)).sum(), leaves
    )
    return loss.detach().double(), [grad.double() for grad in grads]


def assert_near(result, want, rtol, atol=0.0, loss_atol=1e-6):
    torch.testing.assert_close(result[0], want[0], rtol=rtol, atol=loss_atol)
    for got, exact in zip(result[1], want[1], strict=True):
        assert torch.isfinite(got).all()
        assert (got - exact).norm() <= rtol * exact.norm() + atol


def whole(low, high, *shape):
    return torch.randint(low, high + 1, shape).float()


def problem(n=20, vocab=20, width=6):
    """Returns tensors of whole numbers and an embedding. A fifth of the targets is ignored.

    Some targets have duplicates in the embedding, and some have a row of zeros.
    """
    targets = torch.where(torch.rand(n) < 0.2, -100, torch.randint(vocab, (n,)))
    embedding = torch.randn(vocab, 5)
    embedding[3], embedding[-2:] = 2 * embedding[4], 0
    targets[:4] = torch.tensor([3, 4, vocab - 1, vocab - 2])
    return {
        "hidden": whole(-2, 2, n, width),
        "weight": whole(-3, 3, vocab, width) / 4,
        "targets": targets,
    }, embedding


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "mode",
    [
        *MODES,
        Objective("emo", "upstream"),
        Objective("emo2", "upstream"),
        Objective("emo", emo_ratio_cap=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode_with_bias_softcap_scale_and_weights(backend, mode, reduction):
    tensors, embedding = problem()
    options = {
        "mode": mode,
        "reduction": reduction,
        "bias": whole(-2, 2, 20) / 4,
        "softcap": 3.0,
        "logit_scale": 0.75,
        "token_weights": torch.rand(20),
        "upstream": torch.rand(20) if reduction == "none" else None,
    }
    want = loss_and_gradients(
        torch.float64,
        **tensors,
        cost=CostEmbedding(embedding.double()),
        backend="reference",
        **options,
    )
    result = loss_and_gradients(
        torch.float32, **tensors, cost=CostEmbedding(embedding), backend=backend, **options
    )
    assert_near(result, want, rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", ["frozen", "cached", "full", "adaptive", "identity", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_cost(backend, kind, soft):
    tensors, embedding = problem()
    cost = {
        "frozen": lambda dtype: CostEmbedding(embedding.to(dtype)),
        "cached": lambda _: CostEmbedding(embedding).cache(1.0),
        "full": lambda _: CostEmbedding(embedding).cache(7 * 40 / 2**20),  # room for 7 of 20 rows
        "adaptive": lambda dtype: CostEmbedding(tensors["weight"].to(dtype)),
        "identity": lambda dtype: CostEmbedding(None, "identity"),
        "none": lambda dtype: None,
    }[kind]
    options = {"soft": None, "mode": "mle" if kind == "none" else "emo"}
    probs = torch.rand(20, 4).double()
    if soft:
        options["soft"] = SoftTargets(
            torch.randint(20, (20, 4)), probs / probs.sum(1, keepdim=True)
        )
    want = loss_and_gradients(
        torch.float64, **tensors, cost=cost(torch.float64), backend="reference", **options
    )
    result = loss_and_gradients(
        torch.float32, **tensors, cost=cost(torch.float32), backend=backend, **options
    )
    assert_near(result, want, rtol=1e-5)


def exact_error(dtype, mode, backend, one_minus_p):
    """Returns the greatest relative error of a token's gradient, given its logits.

    The logits are hidden @ identity.
    """
    targets, embedding = torch.randint(20, (30,)), torch.randn(20, 8)
    logits = 3 * torch.randn(30, 20)
    if one_minus_p is not None:
        others = logits.double().scatter(1, targets[:, None], -torch.inf).logsumexp(1)
        logits[torch.arange(30), targets] = (
            others - torch.tensor(one_minus_p).double().logit()
        ).float()
    logits = logits.to(dtype).float()
    args = (logits, torch.eye(20), targets)
    options = {"mode": mode, "reduction": "sum"}
    _, (want, _) = loss_and_gradients(
        torch.float64, *args, CostEmbedding(embedding.double()), backend="reference", **options
    )
    _, (got, _) = loss_and_gradients(
        dtype, *args, CostEmbedding(embedding), backend=backend, **options
    )
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max()


@pytest.mark.parametrize("one_minus_p", [None, 1e-2, 1e-4, 1e-8, 1e-12, 1e-20])
@pytest.mark.parametrize("mode", ["mle", "emo", "emo2", "mix"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_given_float32_logits(backend, mode, one_minus_p):
    assert exact_error(torch.float32, mode, backend, one_minus_p) <= 1e-5


@pytest.mark.parametrize("towards_target", [0, 8, 16, 24, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_through_the_head_the_error_is_at_most_twice_that_of_cross_entropy(
    backend, dtype, towards_target
):
    weight, targets, embedding = (
        torch.randn(80, 64) / 8,
        torch.randint(80, (12,)),
        torch.randn(80, 16),
    )
    hidden = (
        torch.randn(12, 64)
        + towards_target * weight[targets] / weight[targets].norm(dim=1, keepdim=True) ** 2
    )
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    def cross_entropy(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        logits = leaves[0] @ leaves[1].T
        loss = torch.nn.functional.cross_entropy(
            logits.double() if dtype == torch.float64 else logits.float(), targets
        )
        return [grad.double() for grad in torch.autograd.grad(loss, leaves)]

    allowed = [
        (a - b).norm() / b.norm()
        for a, b in zip(cross_entropy(dtype), cross_entropy(torch.float64), strict=True)
    ]
    for mode in ("emo", "emo2"):
        args = (hidden, weight, targets)
        want = loss_and_gradients(
            torch.float64, *args, CostEmbedding(embedding.double()), backend="reference", mode=mode
        )
        got = loss_and_gradients(dtype, *args, CostEmbedding(embedding), backend=backend, mode=mode)
        # Triton's interpreter truncates to bfloat16 where a GPU rounds.
        factor = 4 if backend == "triton" and dtype == torch.bfloat16 else 2
        for a, b, error in zip(got[1], want[1], allowed, strict=True):
            assert (a - b).norm() / b.norm() <= factor * error + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_costs_that_begin_far_below_the_logits_that_cost_nothing(backend):
    embedding = torch.randn(20, 5)
    embedding[1] = embedding[0]
    logits = torch.randn(6, 20)
    # The duplicates 0 and 1 share the probability.
    logits[:, 2:] -= torch.tensor([0.0, 50, 80, 120, 500, 5000])[:, None]
    args = (logits, torch.eye(20), torch.zeros(6, dtype=torch.long))
    want = loss_and_gradients(
        torch.float64, *args, CostEmbedding(embedding.double()), backend="reference"
    )
    result = loss_and_gradients(torch.float32, *args, CostEmbedding(embedding), backend=backend)
    assert_near(result, want, rtol=5e-4)  # float32's last digit of a logit of 5000
    nowhere = CostEmbedding(torch.ones(20, 5))  # no costs, so no EMO term
    want = loss_and_gradients(torch.float64, *args, nowhere, backend="reference")
    assert_near(loss_and_gradients(torch.float32, *args, nowhere, backend=backend), want, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 20),
    vocab=st.integers(1, 40),
    width=st.integers(1, 5),
    scale=st.sampled_from([2**-8, 1, 32, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(["cosine", "cached", "identity"]),
    soft=st.booleans(),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
# the softmax of logits of 8,192 in the reference
@example(
    n=3,
    vocab=6,
    width=1,
    scale=4096,
    dtype=torch.float64,
    mode="emo",
    kind="cosine",
    soft=False,
    masked=0.0,
    seed=1,
)
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_random_problems(backend, n, vocab, width, scale, dtype, mode, kind, soft, masked, seed):
    torch.manual_seed(seed)
    hidden, weight = whole(-1, 1, n, width), scale * whole(-2, 2, vocab, width)
    targets = torch.where(torch.rand(n) < masked, -100, torch.randint(vocab, (n,)))
    embedding = whole(-1, 1, vocab, 3)  # many duplicates and rows of zeros
    given_soft = None
    if soft and mode in SOFT_MODES:
        probs = torch.rand(n, 3).double() ** 4
        given_soft = SoftTargets(torch.randint(vocab, (n, 3)), probs / probs.sum(1, keepdim=True))
    if backend == "triton" and dtype == torch.float64:
        dtype = torch.float32

    def run(dtype, backend):
        cost = {
            "cosine": CostEmbedding(embedding.double()),
            "cached": CostEmbedding(embedding).cache(1.0),
            "identity": CostEmbedding(None, "identity"),
        }[kind]
        args = (hidden, weight, targets, cost, given_soft)
        return loss_and_gradients(dtype, *args, mode=mode, reduction="sum", backend=backend)

    rtol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    want = run(torch.float64, "reference")
    # A gradient b pi - b p may be 0 except for rounding. There b may be half of nll, which grows
    # with the scale.
    rounding = (
        {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        * n
        * scale
        * max(1, scale)
    )
    # nll under soft targets is a difference of logits, which is as exact as probabilities are
    difference = 4 * width * n * scale * torch.finfo(torch.float32).eps if given_soft else 0.0
    loss_atol = 1e-6 + (0.0 if dtype == torch.float64 else difference)
    assert_near(run(dtype, backend), want, rtol, atol=rounding, loss_atol=loss_atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("mode", ["emo", "emd"])
def test_nan_is_seen_in_the_loss(backend, where, mode):
    tensors = {"hidden": torch.randn(4, 3), "weight": torch.randn(20, 3)}
    tensors[where][1, 1] = torch.nan
    cost, targets = CostEmbedding(torch.randn(20, 3)), torch.tensor([0, 5, 6, 7])
    options = {"mode": mode, "backend": backend, "reduction": "none"}
    loss = linear_emo_loss(**tensors, targets=targets, cost_embedding=cost, **options)
    want = [where == "weight", True, where == "weight", where == "weight"]
    assert loss.isnan().tolist() == want
