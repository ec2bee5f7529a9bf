"""Sampled gradients are unbiased, leave the loss alone, and are drawn from a seed."""

from functools import partial

import pytest
import torch
from torch import distributed as dist

from stanford_alpaca import linear_emo_loss
from stanford_alpaca.cost import CostEmbedding, ShardedCost
from stanford_alpaca.losses import MODES, Objective, SoftTargets
from stanford_alpaca.losses import functional as linear
from stanford_alpaca.losses.backends import chunked, sampling, torch_kernels
from stanford_alpaca.losses.backends.sampling import Columns, Sampled
from stanford_alpaca.losses.functional import linear_loss_and_stats
from stanford_alpaca.losses.types import Head
from tests.helpers import triton_kernels
from tests.ranks import run_ranks, start_gloo

N, V, H = 24, 60, 5
EPSILON = 0.15
SEEDS = 200
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Triton's interpreter


@pytest.fixture(autouse=True)
def three_slices(monkeypatch):
    monkeypatch.setitem(torch_kernels.SLICE_LOGITS, "cpu", 8 * V)
    monkeypatch.setattr(sampling, "DENSE", 1.0)


@pytest.fixture
def interpreted(monkeypatch):
    kernels = triton_kernels()
    if kernels.triton is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(linear, "triton_kernels", kernels)
    monkeypatch.setitem(linear.BACKENDS, "triton", partial(chunked.linear_loss, kernels=kernels))


def problem(dtype=torch.float64, **changes):
    """Returns the arguments of a loss whose logits are as sharp as a trained model's."""
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    arguments = {
        "hidden": 1.5 * draw(N, H),
        "weight": draw(V, H),
        "targets": torch.randint(V, (N,), generator=generator),
        "cost_embedding": CostEmbedding(draw(V, 4).to(dtype)),
        "bias": draw(V),
        "reduction": "sum",
    }
    given = arguments | changes
    return {
        name: value.to(dtype) if name in ("hidden", "weight", "bias") else value
        for name, value in given.items()
        if value is not None
    }


def gradients(arguments, upstream=None, **sampled):
    """Returns the loss and the gradients of hidden states, weight and bias."""
    leaves = {
        name: arguments[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")
    }
    loss = linear_emo_loss(**arguments | leaves, **sampled)
    total = loss if upstream is None else (loss * upstream).sum()
    return loss.detach(), torch.autograd.grad(total, list(leaves.values()))


def by_seeds(arguments, count, **options):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield gradients(
            arguments,
            head_gradient="sampled",
            head_epsilon=EPSILON,
            generator=generator,
            **options,
        )


def assert_unbiased(samples, exact):
    """The error of the mean has the size that independent draws of the same variance give it."""
    samples = torch.stack(samples)
    count, error = len(samples), samples.mean(0) - exact
    variance = samples.var(0)
    assert variance.sum() > 0
    ratio = error.square().sum() / (variance.sum() / count)
    assert 0.15 < ratio < 2.5, ratio
    # nowhere is it systematic; that of rarely drawn entries is not known well from so few draws
    score = error / ((variance + 0.3 * variance.mean()) / count).sqrt()
    assert score.abs().max() < 5.5


def soft_targets():
    ids = torch.randint(V, (N, 3), generator=torch.Generator().manual_seed(5))
    probs = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).expand(N, 3)
    return SoftTargets(ids, probs)


CASES = {mode: {"mode": mode} for mode in MODES} | {
    "upstream": {"mode": Objective("emo", "upstream")},
    "capped": {"mode": "emo", "softcap": 4.0, "logit_scale": 0.5},
    "weighted": {"mode": "emo", "token_weights": torch.linspace(0.1, 2, N)},
    "identity": {"mode": "emo", "cost_embedding": CostEmbedding(None, "identity")},
    "soft": {"mode": "mix", "soft_targets": soft_targets()},
}


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_seeds_is_the_exact_gradient(name):
    arguments = problem(**CASES[name])
    loss, exact = gradients(arguments)
    drawn = list(by_seeds(arguments, SEEDS))
    assert all(torch.equal(found, loss) for found, _ in drawn)
    for part in range(3):  # of hidden states, weight and bias
        assert_unbiased([found[part] for _, found in drawn], exact[part])


def test_few_columns_are_kept_and_the_error_falls_with_the_threshold():
    arguments = problem(hidden=4 * problem()["hidden"])
    _, exact = gradients(arguments)
    errors = []
    for epsilon in (0.1, 0.01, 0.001):
        generator = torch.Generator().manual_seed(0)
        options = {"head_epsilon": epsilon, "generator": generator}
        _, found = gradients(arguments, head_gradient="sampled", **options)
        errors.append((found[0] - exact[0]).norm() / exact[0].norm())
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_cached_and_adaptive_costs_and_a_frozen_head():
    weight = problem()["weight"]
    for cost in (CostEmbedding(weight.float()).cache(1.0), CostEmbedding(weight)):
        arguments = problem(cost_embedding=cost, bias=None)
        hidden = arguments["hidden"].clone().requires_grad_()
        rest = {name: value for name, value in arguments.items() if name != "hidden"}
        (exact,) = torch.autograd.grad(linear_emo_loss(hidden, **rest), hidden)
        drawn = []
        for seed in range(SEEDS):
            options = {"generator": torch.Generator().manual_seed(seed), "head_epsilon": EPSILON}
            loss = linear_emo_loss(hidden, **rest, head_gradient="sampled", **options)
            drawn.append(torch.autograd.grad(loss, hidden)[0])
        assert_unbiased(drawn, exact)


@pytest.mark.parametrize("mode", ["mle", "emo", "mix"])
def test_triton_kernels_draw_the_same_columns(interpreted, monkeypatch, mode):
    def from_the_whole(self, draws, *vectors):  # PyTorch's own draws by bounds of the entries
        return draws.sample(self.gradient(*vectors))

    monkeypatch.setattr(torch_kernels.Chunk, "sample", from_the_whole)
    monkeypatch.setitem(torch_kernels.SLICE_LOGITS, "cpu", N * V)
    arguments = problem(torch.float32, mode=mode, softcap=5.0, logit_scale=0.7)
    (_, theirs), (_, ours) = (
        next(by_seeds(arguments | {"backend": backend}, 1)) for backend in ("chunked", "triton")
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    _, exact = gradients(arguments)
    assert not torch.allclose(ours[0], exact[0], rtol=1e-3)


def test_a_loss_per_token_is_drawn_in_backward_as_its_sum_is_in_forward():
    arguments = problem()
    (_, summed) = next(by_seeds(arguments, 1))
    each = arguments | {"reduction": "none"}
    for scale in (1.0, 1e-6, 1e6):  # the threshold follows the loss scale
        (_, found) = next(by_seeds(each, 1, upstream=torch.full((N,), scale)))
        for got, want in zip(found, summed, strict=True):
            torch.testing.assert_close(got, scale * want, rtol=1e-3, atol=1e-6 * scale)
    upstream = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, exact = gradients(each, upstream=upstream)
    drawn = [found for _, found in by_seeds(each, SEEDS, upstream=upstream)]
    assert_unbiased([found[0] for found in drawn], exact[0])
    zero = next(by_seeds(each, 1, upstream=torch.zeros(N)))[1]
    assert all(not grad.any() for grad in zero)


def test_the_seed_decides_and_the_random_state_of_training_is_left_alone():
    arguments = problem()
    before = torch.get_rng_state()
    runs = [next(by_seeds(arguments, 1))[1][0] for _ in range(2)]
    assert torch.equal(*runs)
    options = {"head_gradient": "sampled", "head_epsilon": EPSILON}
    first, second = (gradients(arguments, **options)[1][0] for _ in range(2))
    assert not torch.equal(first, second)  # without a generator, it moves on
    assert torch.equal(torch.get_rng_state(), before)


def test_where_it_does_not_pay_the_gradient_is_exact(monkeypatch):
    monkeypatch.setattr(sampling, "DENSE", 0.01)
    arguments = problem()
    _, exact = gradients(arguments)
    _, found = next(by_seeds(arguments, 1))
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_slices_with_and_without_a_sample_go_together(monkeypatch):
    draw, calls = Columns.draw, []

    def every_other(self, bound):
        calls.append(bound)
        return None if len(calls) % 3 == 2 else draw(self, bound)

    monkeypatch.setattr(Columns, "draw", every_other)
    arguments = problem()
    _, exact = gradients(arguments)
    drawn = [found for _, found in by_seeds(arguments, SEEDS)]
    assert len(calls) == 3 * SEEDS
    for part in (0, 1):
        assert_unbiased([found[part] for found in drawn], exact[part])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad):
    arguments = problem(mode="mle")
    arguments["hidden"][7, 2] = bad
    _, exact = gradients(arguments)
    _, found = next(by_seeds(arguments, 1))
    assert not torch.isfinite(exact[1]).all() and not torch.isfinite(found[1]).all()
    columns = Columns(Sampled(), 4, torch.device("cpu"), 1.0)
    g = torch.tensor([[1e-9, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, bad]])
    drawn = columns.sample(g)
    assert drawn is None or 3 in drawn[0]


def test_a_column_of_zeros_is_dropped():
    columns = Columns(Sampled(0.5), 4, torch.device("cpu"), 1.0)
    for _ in range(20):
        kept, entries = columns.sample(torch.tensor([[0.0, 0.7, 0.0, 1e-3]]))
        assert 0 not in kept and 2 not in kept and 1 in kept
        assert entries[0, kept == 1] == 0.7 and (entries[0, kept == 3] == 0.5).all()


def test_what_is_refused():
    arguments = problem()
    for options, message in (
        ({"backend": "reference"}, "exact gradients alone"),
        ({"head_epsilon": 0}, "head_epsilon is 0"),
        ({"head_epsilon": 1.5}, "head_epsilon is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_emo_loss(**arguments, head_gradient="sampled", **options)
    with pytest.raises(
        ValueError, match="unknown head_gradient 'some': choose from exact, sampled"
    ):
        linear_emo_loss(**arguments, head_gradient="some")


def shard(count):
    """Returns this rank's exact and sampled gradients of its hidden states and of its rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    start_gloo()
    sampling.DENSE = 1.0
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    given = problem()
    own = slice(rank * N // 2, (rank + 1) * N // 2)
    cost = ShardedCost(given["cost_embedding"])

    def run(sampled):
        hidden = given["hidden"][own].clone().requires_grad_()
        weight = distribute_tensor(given["weight"], mesh, [Shard(0)]).requires_grad_()
        loss, _ = linear_loss_and_stats(
            hidden, Head(weight), given["targets"][own], cost, "emo", num_items=1, sampled=sampled
        )
        loss.backward()
        return hidden.grad, weight.grad.full_tensor()

    return run(None), [run(Sampled(EPSILON, 2 * seed + rank)) for seed in range(count)]


def test_each_shard_of_the_vocabulary_draws_its_own_columns():
    parts = run_ranks(2, shard, 60)
    for exact, drawn in parts:
        for part in (0, 1):
            assert_unbiased([found[part] for found in drawn], exact[part])
