"""Soft targets in two backends equal explicit float64 sums over pairs of tokens.

One-hot soft targets equal hard targets.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import Objective
from stanford_alpaca.losses.backends import chunked, reference, torch_kernels
from stanford_alpaca.losses.types import Head, SoftTargets

N, V, H, K = 37, 40, 8, 5
SERVED = {
    "mle": Objective("mle"),
    "emo": Objective("emo"),
    "emo2": Objective("emo2"),
    "emd": Objective("emd"),
    "mix": Objective("mix", emo_weight=0.3),
    "cap": Objective("emo", emo_ratio_cap=3.0),
}


@pytest.fixture(params=[reference, chunked], ids=["reference", "chunked"])
def backend(request, monkeypatch):
    # A chunk has 16 rows, so there are several chunks and a remainder.
    monkeypatch.setitem(torch_kernels.CHUNK_LOGITS, "cpu", 16 * V)
    return request.param


def pair_costs(embedding: torch.Tensor | None) -> torch.Tensor:
    """Returns the costs [V, V] in float64, pair by pair. ``None`` means the identity cost."""
    costs = torch.ones(V, V, dtype=torch.float64)
    if embedding is not None:
        directed = embedding.any(1)
        units = embedding.double()[directed] / embedding.double()[directed].norm(
            dim=1, keepdim=True
        )
        distances = (units[:, None] - units).square().sum(2) / 2  # nothing cancels
        costs[directed[:, None] & directed] = torch.where(
            distances < 1e-6, 0.0, distances
        ).flatten()
    return costs.fill_diagonal_(0.0)


def naive(hidden, weight, bias, soft, costs, objective, softcap=None, logit_scale=1.0):
    """Returns loss, nll and emo of every token, and the gradients of the summed loss.

    The sums over i and j are computed as the formula states them.
    """
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    z = logit_scale * (leaves[0] @ leaves[1].T + leaves[2])
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = z - z.exp().sum(1, keepdim=True).log()
    tau = soft.probs.double()
    nll = -(tau * log_p.gather(1, soft.ids)).sum(1)
    # The sum runs over i and j.
    emo = (log_p.exp()[:, :, None] * tau[:, None, :] * costs[:, soft.ids].transpose(0, 1)).sum(
        (1, 2)
    )
    ratio = (nll / emo).detach()
    loss = {
        "mle": nll,
        "emo": 0.5 * (nll + ratio.clamp(max=objective.emo_ratio_cap or torch.inf) * emo),
        "emo2": nll / ratio + emo,
        "emd": emo,
        "mix": (1 - objective.emo_weight) * nll + objective.emo_weight * emo,
    }[objective.mode]
    return loss.detach(), nll.detach(), emo.detach(), torch.autograd.grad(loss.sum(), leaves)


def ours(backend, hidden, weight, bias, targets, cost, objective, reduction="sum", **head):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    loss, stats = backend.linear_loss(
        leaves[0], Head(leaves[1], leaves[2], **head), targets, cost, objective, reduction
    )
    return loss.detach(), *stats, torch.autograd.grad(loss.sum(), leaves)


def problem(dtype=torch.float32):
    """Returns hidden states, weight, bias, a teacher and an embedding.

    The teacher has repeated ids and entries without probability. The embedding has duplicates and
    rows of zeros, and the teacher names several of them.
    """
    ids, probs = torch.randint(V, (N, K)), torch.rand(N, K, dtype=dtype) ** 4
    ids[:4] = torch.tensor([[3, 4, 5, 3, 9], [38, 39, 1, 38, 2], [7, 7, 7, 7, 7], [39, 0, 0, 4, 4]])
    probs[4:9, 2:] = 0
    embedding = torch.randn(V, 6, dtype=dtype)
    embedding[4] = 2 * embedding[3]
    embedding[-3:] = 0
    leaves = (
        torch.randn(N, H, dtype=dtype),
        torch.randn(V, H, dtype=dtype),
        torch.randn(V, dtype=dtype),
    )
    return *leaves, SoftTargets(ids, probs / probs.sum(1, keepdim=True)), embedding


def assert_same(result, want, rtol, atol):
    loss, nll, log_emo, grads = result
    bounds = {"rtol": rtol, "atol": atol, "check_dtype": False}
    torch.testing.assert_close(loss, want[0] if loss.dim() else want[0].sum(), **bounds)
    torch.testing.assert_close(nll, want[1], **bounds)
    if log_emo is not None:
        torch.testing.assert_close(log_emo.exp(), want[2], **bounds)
    for ours, exact in zip(grads, want[3], strict=True):
        assert (ours.double() - exact).norm() <= rtol * exact.norm()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("objective", SERVED.values(), ids=SERVED)
def test_every_served_mode_equals_the_sums_over_pairs(backend, objective, reduction):
    *leaves, soft, embedding = problem(torch.float64)
    want = naive(*leaves, soft, pair_costs(embedding), objective)
    result = ours(backend, *leaves, soft, CostEmbedding(embedding), objective, reduction)
    assert_same(result, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "head", [{"softcap": 3.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}], ids=str
)
@pytest.mark.parametrize("kind", ["cosine", "identity"])
def test_float32_with_softcap_scale_and_both_costs(backend, kind, head):
    *leaves, soft, embedding = problem()
    want = naive(
        *leaves, soft, pair_costs(embedding if kind == "cosine" else None), SERVED["emo"], **head
    )
    result = ours(backend, *leaves, soft, CostEmbedding(embedding, kind), SERVED["emo"], **head)
    assert_same(result, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("objective", SERVED.values(), ids=SERVED)
def test_one_hot_equals_hard(backend, objective, dtype, rtol):
    hidden, weight, bias, soft, embedding = problem(dtype)
    targets, cost = soft.ids[:, 1], CostEmbedding(embedding)
    hard = ours(backend, hidden, weight, bias, targets, cost, objective)
    hard = hard[0], hard[1], hard[2].exp(), hard[3]
    one_of_k = SoftTargets(soft.ids, torch.tensor([0, 1, 0, 0, 0], dtype=dtype).expand(N, K))
    repeated = SoftTargets(targets[:, None].expand(N, 4), torch.full((N, 4), 0.25, dtype=dtype))
    for one_hot in (
        SoftTargets(targets[:, None], torch.ones(N, 1, dtype=dtype)),
        one_of_k,
        repeated,
    ):
        result = ours(backend, hidden, weight, bias, one_hot, cost, objective)
        assert_same(result, hard, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("away", [0.3, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("one_minus_p", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("mode", ["emo", "emo2", "emd"])
def test_gradient_given_float32_logits_where_model_and_teacher_are_confident(
    backend, mode, one_minus_p, away
):
    embedding = torch.randn(V, 6)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    probs = torch.rand(N, K).double()
    probs[:, 0] = 0
    probs *= away / probs.sum(1, keepdim=True)
    probs[:, 0] = 1 - away
    logits = torch.randn(N, V).scatter(1, ids[:, :1], -torch.inf)
    logits.scatter_(
        1, ids[:, :1], logits.logsumexp(1, keepdim=True) - torch.tensor(one_minus_p).logit()
    )
    eye, zeros = torch.eye(V), torch.zeros(V)  # logits @ identity is exactly the logits
    want = exact_gradient(logits, ids, probs, pair_costs(embedding), mode)
    soft = SoftTargets(ids, probs.float())
    result = ours(backend, logits, eye, zeros, soft, CostEmbedding(embedding), Objective(mode))
    error = (result[3][0] - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() <= 1e-5


def exact_gradient(logits, ids, probs, costs, mode):
    """Returns the gradient of the logits in float64, from d nll = p - tau and d emo = p (c - emo).

    Differences of nearly equal numbers are computed as sums over the tokens other than the most
    probable one, ids[:, 0].
    """
    top, rest = ids[:, :1], probs.clone()
    rest[:, 0] = 0
    p = torch.softmax(logits.double(), 1)
    others = p.scatter(1, top, 0.0)
    d_nll = p.scatter_add(1, ids, -rest).scatter(1, top, (rest.sum(1) - others.sum(1))[:, None])
    drop = (rest * (logits.gather(1, top) - logits.gather(1, ids)).double()).sum(1)
    nll = -torch.log1p(-others.sum(1)) + drop
    c = (probs[:, :, None] * costs[ids]).sum(1)
    more = c - c.gather(1, top)
    d_emo = p * (more - (others * more).sum(1, keepdim=True))
    ratio = (nll / (p * c).sum(1))[:, None]
    return {"emo": 0.5 * (d_nll + ratio * d_emo), "emo2": d_nll / ratio + d_emo, "emd": d_emo}[mode]


def test_expected_costs_keep_their_digits_at_a_teacher_that_is_nearly_sure():
    embedding = torch.randn(V, 6)
    embedding[4], embedding[-1] = 2 * embedding[3], 0
    cost, pairs = CostEmbedding(embedding), pair_costs(embedding)
    ids = torch.tensor([[5, 9], [9, 39], [39, 9], [3, 4]])
    for away in (0.4, 1e-3, 1e-7):
        probs = torch.full((4, 1), away)
        ours = cost.costs(ids[:, 0], V, (ids[:, 1:], probs)).double()
        want = (1 - away) * pairs[ids[:, 0]] + away * pairs[ids[:, 1]]
        assert (ours - want).abs().max() <= 1e-6  # costs below ZERO_BELOW are 0
        rows = torch.arange(4)
        torch.testing.assert_close(ours[rows, ids[:, 0]], want[rows, ids[:, 0]], rtol=1e-6, atol=0)
        assert ours[3, 3] == 0 and ours[3, 4] == 0  # duplicates of each other


def test_a_masked_logit_without_probability_is_no_nan(backend):
    hidden, weight, bias, soft, embedding = problem()
    soft.ids[:, 4], soft.probs[:, 4] = 17, 0
    soft = SoftTargets(
        torch.where(soft.ids == 17, 16, soft.ids), soft.probs / soft.probs.sum(1, keepdim=True)
    )
    soft.ids[:, 4], bias[17] = 17, -torch.inf
    loss, nll, _, (d_hidden, d_weight, _) = ours(
        backend, hidden, weight, bias, soft, CostEmbedding(embedding), SERVED["emo"]
    )
    assert torch.isfinite(loss) and torch.isfinite(nll).all()
    assert torch.isfinite(d_hidden).all() and torch.isfinite(d_weight).all()


def test_bfloat16_hidden_states_err_as_pytorch_does():
    hidden, weight, bias, soft, embedding = problem()
    hidden, bias, cost = hidden / 4, 0 * bias, CostEmbedding(embedding)
    dense = torch.zeros(N, V).scatter_add_(1, soft.ids, soft.probs)

    def torch_gradients(dtype):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        torch.nn.functional.cross_entropy((h @ w.T).float(), dense, reduction="sum").backward()
        return [h.grad.double(), w.grad.double()]

    exact = ours(
        reference,
        hidden.double(),
        weight.double(),
        bias.double(),
        SoftTargets(soft.ids, soft.probs.double()),
        cost,
        SERVED["emo"],
    )[3]
    low = ours(
        chunked, hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), soft, cost, SERVED["emo"]
    )[3]
    for ours_, want, bad, good in zip(
        low[:2],
        exact[:2],
        torch_gradients(torch.bfloat16),
        torch_gradients(torch.float64),
        strict=True,
    ):
        assert (ours_.double() - want).norm() / want.norm() <= 2 * (
            bad - good
        ).norm() / good.norm() + 1e-6


def test_no_tokens_give_zero_loss_and_zero_gradients(backend):
    hidden, weight, bias, soft, embedding = problem()
    nobody = SoftTargets(soft.ids[:0], soft.probs[:0])
    loss, _, _, grads = ours(
        backend, hidden[:0], weight, bias, nobody, CostEmbedding(embedding), SERVED["emo"]
    )
    assert loss.item() == 0
    assert all(grad.abs().sum().item() == 0 for grad in grads)


def test_chunked_never_holds_more_than_a_chunk_of_logits(monkeypatch):
    *leaves, soft, embedding = problem()
    monkeypatch.setitem(torch_kernels.CHUNK_LOGITS, "cpu", 16 * V)
    with LargestTensor() as seen:
        ours(chunked, *leaves, soft, CostEmbedding(embedding), SERVED["emo"])
    assert seen.numel == 13 * V  # 37 rows in 3 chunks, never [N, V] or [chunk, k, V]


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.numel = max(
            [self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


def test_emd_is_smallest_at_one_token_and_not_at_the_teacher():
    _, _, _, soft, embedding = problem(torch.float64)
    cost, objective = CostEmbedding(embedding), SERVED["emd"]
    teacher = torch.zeros(N, V, dtype=torch.float64).scatter_add_(1, soft.ids, soft.probs)
    at_teacher = objective(*reference.token_stats(teacher.log(), soft, cost))
    best = (soft.probs[:, :, None] * pair_costs(embedding)[soft.ids]).sum(1).min(1)
    vertex = torch.full((N, V), -800.0, dtype=torch.float64).scatter(
        1, best.indices[:, None], 800.0
    )
    at_vertex = objective(*reference.token_stats(vertex, soft, cost))
    torch.testing.assert_close(at_vertex, best.values, rtol=1e-9, atol=1e-9)
    assert (at_vertex <= at_teacher + 1e-9).all() and (at_vertex < at_teacher - 1e-3).sum() > N // 2
