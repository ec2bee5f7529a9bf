"""An output layer sharded by vocabulary equals the whole one, in value and gradient.

Its collectives move as many bytes as the docstring of vocab_parallel.py says.
"""

import itertools

import pytest
import torch
from torch import distributed as dist

from benchmarks.traffic import Traffic
from stanford_alpaca.cost import CostEmbedding, ShardedCost
from stanford_alpaca.losses.backends import chunked
from stanford_alpaca.losses.functional import linear_loss_and_stats
from stanford_alpaca.losses.types import Head, SoftTargets
from tests.ranks import run_ranks, start_gloo

VOCABULARY, WIDTH = 23, 5  # 23 is divisible neither by 2 nor by 3
COUNTS = (7, 0, 4)  # supervised tokens of each rank
HEADS = {"plain": (None, None), "capped": (2.0, 0.5), "huge": (None, 3000.0)}


def problem(bias: bool):
    """Returns hidden states of three ranks, weight, bias, rows of a cost, and targets, in float64.

    The rows of the cost have a duplicate and a row of zeros.
    """
    make = torch.Generator().manual_seed(3)
    hidden = torch.randn(sum(COUNTS), WIDTH, generator=make, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=make, dtype=torch.float64)
    rows = torch.randn(VOCABULARY, 4, generator=make, dtype=torch.float64)
    rows[3], rows[20] = rows[11], 0
    targets = torch.randint(VOCABULARY, (len(hidden),), generator=make)
    targets[:3] = torch.tensor([3, 11, 20])
    return (
        hidden,
        weight,
        torch.randn(VOCABULARY, generator=make, dtype=torch.float64) if bias else None,
        rows,
        targets,
    )


def whole(case, dtype):
    mode, kind, head, bias = case
    hidden, weight, b, rows, targets = problem(bias)
    tensors = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, b)]
    cost = CostEmbedding(rows.to(dtype) if kind == "cosine" else None, kind)
    loss, stats = linear_loss_and_stats(
        tensors[0],
        Head(*tensors[1:], *HEADS[head]),
        targets,
        cost,
        mode,
        backend="reference",
        num_items=100,
    )
    loss.backward()
    return loss.detach(), stats, [None if x is None else x.grad for x in tensors]


def part(cases, dtype):
    """Returns this rank's loss, statistics and gradients for each case.

    The gradients are those of its hidden states and of the gathered weight and bias.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    start_gloo()
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh, results = init_device_mesh("cpu", (ranks,)), []
    first = sum(COUNTS[:rank])
    own = slice(first, first + COUNTS[rank] if rank < ranks - 1 else None)
    for mode, kind, head, bias in cases:
        hidden, weight, b, rows, targets = problem(bias)
        h = hidden.to(dtype)[own].requires_grad_()
        sharded = [
            None if x is None else distribute_tensor(x.to(dtype), mesh, [Shard(0)]).requires_grad_()
            for x in (weight, b)
        ]
        cost = CostEmbedding(rows.to(dtype) if kind == "cosine" else None, kind)
        cost = ShardedCost(cost) if kind == "cosine" else cost
        loss, stats = linear_loss_and_stats(
            h,
            Head(*sharded, *HEADS[head]),
            targets[own],
            cost,
            mode,
            backend="chunked",
            num_items=100,
        )
        loss.backward()
        # The gradient of the head is the mean over ranks, as with FSDP.
        grads = [None if x is None else x.grad.full_tensor() * ranks for x in sharded]
        results.append((loss.detach(), stats, [h.grad, *grads]))
    return results


CASES = [
    *itertools.product(("mle", "emo", "emo2", "mix"), ("cosine", "identity"), HEADS, (False,)),
    ("emo", "cosine", "plain", True),
    ("emo", "cosine", "capped", True),
    ("tailr", "identity", "plain", False),
]


@pytest.mark.parametrize(("ranks", "dtype"), [(3, torch.float64), (2, torch.float32)])
def test_equals_the_reference(monkeypatch, ranks, dtype):
    monkeypatch.setitem(chunked.torch_kernels.CHUNK_LOGITS, "cpu", 1)  # at least 16 tokens a chunk
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 1e-6}
    )
    parts = run_ranks(ranks, part, CASES, dtype)
    for number, case in enumerate(CASES):
        if dtype == torch.float32 and case[2] == "huge":
            continue  # the product itself is exact to 3 digits only
        loss, stats, (d_hidden, *grads) = whole(case, dtype)
        mine = [results[number] for results in parts]
        torch.testing.assert_close(sum(result[0] for result in mine), loss, **tolerance)
        torch.testing.assert_close(
            torch.cat([result[1].nll for result in mine]), stats.nll, **tolerance
        )
        torch.testing.assert_close(
            torch.cat([result[1].log_emo for result in mine]), stats.log_emo, **tolerance
        )
        torch.testing.assert_close(
            torch.cat([result[2][0] for result in mine]), d_hidden, **tolerance
        )
        for result in mine:
            for got, want in zip(result[2][1:], grads, strict=True):
                torch.testing.assert_close(got, want, **tolerance)


def moved():
    """Returns the calls and bytes of one loss with its backward pass."""
    with Traffic() as traffic:
        part([("emo", "cosine", "plain", False)], torch.float32)
    return traffic.calls, traffic.bytes


def test_it_moves_what_the_docstring_says():
    """There are 2 ranks with at most n = 7 tokens, so N = 14, and one chunk of c = 11 tokens.

    Each rank receives half of what is gathered or scattered.
    """
    different = len(problem(False)[4].unique())
    for calls, received in run_ranks(2, moved):
        assert (calls["all-gather"], calls["all-reduce"], calls["reduce-scatter"]) == (3, 3, 1)
        assert received["all-gather"] == (2 * 8 + 14 * WIDTH * 4 + 14 * 8) / 2
        assert received["all-reduce"] == different * 4 * 4 + (2 + 3) * 11 * 4
        assert received["reduce-scatter"] == 14 * WIDTH * 4 / 2


def refusals():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    start_gloo()
    mesh = init_device_mesh("cpu", (2,))
    hidden, targets = torch.randn(2, WIDTH), torch.tensor([0, 1])
    weight, few = (
        distribute_tensor(torch.randn(rows, WIDTH), mesh, [Shard(0)]) for rows in (VOCABULARY, 1)
    )
    columns = distribute_tensor(torch.randn(VOCABULARY, WIDTH), mesh, [Shard(1)])
    messages = []
    for w, options in [
        (weight, {"reduction": "none"}),
        (weight, {"backend": "reference"}),
        (weight, {"soft_targets": SoftTargets(targets[:, None], torch.ones(2, 1))}),
        (weight, {"mode": "emo", "cost_embedding": torch.randn(VOCABULARY, 4)}),
        (columns, {}),
        (few, {}),
    ]:
        rows = targets.clamp_max(len(w) - 1)
        with pytest.raises(ValueError) as error:
            linear_loss_and_stats(
                hidden, Head(w), rows, **{"cost_embedding": None, "mode": "mle"} | options
            )
        messages.append(str(error.value))
    return messages


def test_what_it_cannot_do_is_refused():
    parts = (
        "no unreduced loss",
        "backend reference",
        "no soft targets",
        "needs a ShardedCost",
        "by vocabulary",
        "too small",
    )
    for messages in run_ranks(2, refusals):  # all ranks refuse, or some would wait
        for message, want in zip(messages, parts, strict=True):
            assert want in message


def gathered(rows: torch.Tensor, from_rank_0: bool = False):
    """Returns the rows that this rank keeps, what it gathers, and the calls and bytes of that."""
    start_gloo()
    own = rows if dist.get_rank() == 0 or not from_rank_0 else rows.to("meta")
    cost = ShardedCost(CostEmbedding(own), from_rank_0=from_rank_0)
    with Traffic() as traffic:
        whole = cost.gather()
    return cost.rows, whole.rows, whole.directed, dict(traffic.calls), traffic.total


def test_a_sharded_cost_gathers_what_it_was():
    rows = torch.randn(VOCABULARY, 4)
    rows[20] = 0
    want = CostEmbedding(rows)
    for rank, (kept, whole, directed, calls, received) in enumerate(run_ranks(3, gathered, rows)):
        assert torch.equal(kept, want.rows[8 * rank : 8 * rank + 8])  # ceil(23 / 3)
        assert torch.equal(whole, want.rows) and torch.equal(directed, want.directed)
        assert calls == {"all-gather": 1} and received == 24 * 4 * 4 * 2 // 3


def test_the_last_ranks_may_have_no_rows():
    rows = torch.randn(5, 4)
    want = CostEmbedding(rows).rows
    for rank, (kept, whole, *_) in enumerate(run_ranks(4, gathered, rows, True)):  # 2, 2, 1 and 0
        assert torch.equal(kept, want[2 * rank : 2 * rank + 2]) and torch.equal(whole, want)
