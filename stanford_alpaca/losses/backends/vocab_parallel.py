"""The loss where the output layer and the costs stay sharded by vocabulary: hidden states travel, not weights.

Every rank takes the tokens of all ranks through its own rows of the vocabulary (Megatron-LM, arXiv 1909.08053, section 3), in
the chunks of chunked.py. Each statistic is a sum of non-negative terms over the vocabulary, so the ranks' parts add up; nothing
else of the mathematics changes.

Collectives of one call on R ranks of n supervised tokens (the most that one has, N = R n in all), width H, costs of width D:

    forward    all-gather 1 int64 of each rank, then [n, H] hidden states in their dtype, then n targets (int64)
               each chunk of c tokens with u different targets:
               all-reduce [u, D] rows of the costs, all-reduce max [2, c], all-reduce sum [3, c] (float32)
    backward   reduce-scatter [N, H] gradients of the hidden states (float32)

Without costs there are no rows, and one row less of maxima and sums; without gradients no backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from stanford_alpaca.cost import Cost, CostRows, ShardedCost
from stanford_alpaca.distributed.collectives import all_gather, reduce_scatter
from stanford_alpaca.losses.backends import chunked, torch_kernels
from stanford_alpaca.losses.types import Chunk, Head, Kernels, LossOfStats, SoftTargets, TokenStats


def linear_loss(
    hidden: Tensor,  # [n, H] this rank's tokens; n differs from rank to rank
    head: Head,  # DTensors: the weight [V, H] sharded by rows
    targets: Tensor | SoftTargets,  # [n]
    cost: Cost | None,  # an identity, or of the same shards
    objective: LossOfStats,
    reduction: str,  # "sum"
    token_weights: Tensor | None = None,
    kernels: Kernels = torch_kernels,
) -> tuple[Tensor, TokenStats]:
    """``reference.linear_loss`` of this rank's tokens. All ranks call it together, and backward too where they learn.

    The gradient that arrives must be equal on all ranks, as it is after a division by the global count of targets. That of the
    head's rows is the mean over ranks, as FSDP makes it for other weights, and complete: nothing is left to be reduced.

    Raises:
        ValueError: reduction "none", soft targets, costs that are not sharded, or a head that is sharded otherwise.
    """
    if reduction != "sum":
        raise ValueError("a sharded output layer has no unreduced loss: use reduction mean or sum")
    if isinstance(targets, SoftTargets):
        raise ValueError(
            "a sharded output layer takes no soft targets: gather it, or leave the teacher out"
        )
    weight, bias, group = _local(head, hidden.device)
    if cost is not None and cost.rows is not None and not isinstance(cost, ShardedCost):
        raise ValueError("a sharded output layer needs a ShardedCost")
    ranks, vocab_size = dist.get_world_size(group), head.weight.shape[0]
    columns = -(-vocab_size // ranks)
    if columns * (ranks - 1) >= vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} is too small for {ranks} ranks: one has no part of it"
        )
    tokens = _Tokens(len(hidden), group, hidden.device)
    everyone = tokens.gather(hidden)
    goals = tokens.gather(targets)
    weights = None if token_weights is None else tokens.gather(token_weights)
    for part in (weight, bias):
        if part is not None and part.requires_grad:
            part.register_hook(lambda grad: grad / ranks)
    total, stats = chunked.linear_loss(
        everyone, Head(weight, bias, head.softcap, head.logit_scale), goals, cost, objective, "sum", weights,
        kernels=_Kernels(kernels, columns, group),
    )  # fmt: skip
    own = slice(tokens.start, tokens.start + len(hidden))
    stats = TokenStats(stats.nll[own], None if stats.log_emo is None else stats.log_emo[own])
    with torch.no_grad():
        loss = objective(*stats)
        loss = (loss if token_weights is None else loss * token_weights).sum()
    return loss + (total - total.detach()), stats  # this rank's value with the gradient of all


def _local(head: Head, device: torch.device) -> tuple[Tensor, Tensor | None, dist.ProcessGroup]:
    """This rank's rows of the weight and the bias, on the device if they were offloaded, and the group that shares them."""
    weight = head.weight
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        raise ValueError(
            f"wanted an output layer sharded by vocabulary over one group of ranks, not {type(weight).__name__}"
        )
    bias = None if head.bias is None else head.bias.to_local().to(device)  # type: ignore[attr-defined]
    return weight.to_local().to(device), bias, weight.device_mesh.get_group()


class _Tokens:
    """The supervised tokens of all ranks: how many each has, and where this rank's stand. One all-gather, one wait."""

    def __init__(self, count: int, group: dist.ProcessGroup, device: torch.device):
        counts = all_gather(torch.tensor([count], device=device), group)
        numbers = counts.tolist()
        self.group, self.most, self.start = (
            group,
            max(numbers),
            sum(numbers[: dist.get_rank(group)]),
        )
        self._keep = (
            torch.arange(self.most, device=device) < counts[:, None]
        ).flatten()  # [R * most]

    def gather(self, own: Tensor) -> Tensor:  # [n, ...] -> [N, ...]
        """Of all ranks, in their order. One all-gather of the most that a rank has, if any has some."""
        if self.most == 0:
            return own
        padded = own.new_zeros(self.most, *own.shape[1:]).index_copy(
            0, torch.arange(len(own), device=own.device), own
        )
        return _GatherRows.apply(padded, self.group)[self._keep]


class _GatherRows(torch.autograd.Function):
    """[n, ...] of each rank -> [R n, ...] on all; backward sums what the ranks have for each, in float32."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(own, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        exact = grad if grad.dtype == torch.float64 else grad.float()
        return reduce_scatter(exact, ctx.group).to(grad.dtype), None


class _Kernels:
    """The kernels that serve one shard: each rank has ``columns`` of the vocabulary, the last ones fewer."""

    def __init__(self, kernels: Kernels, columns: int, group: dist.ProcessGroup):
        self.CHUNK_LOGITS, self.COLUMNS = (
            kernels.CHUNK_LOGITS,
            columns,
        )  # equal on all ranks, as chunks have to be
        self._kernels, self._start, self._group = kernels, columns * dist.get_rank(group), group

    def Chunk(
        self, product: Tensor, head: Head, targets: Tensor, costs: CostRows | None
    ) -> "_Chunk":
        chunk = self._kernels.Chunk
        return _Chunk(chunk, self._start, self._group, product, head, targets, costs)


class _Chunk:
    """A Chunk whose logits stand on all ranks: statistics and gradient of the whole, from this rank's columns.

    Where the target stands on another rank, this rank's first column is given to the kernels as the target, and what they leave
    out for it is put back: everything here is a sum.
    """

    def __init__(
        self,
        chunk: Callable[..., Chunk],
        start: int,
        group: dist.ProcessGroup,
        product: Tensor,
        head: Head,
        targets: Tensor,
        costs: CostRows | None,
    ) -> None:
        local = targets - start
        self._mine = (local >= 0) & (local < product.shape[1])
        self._group, self._costs = group, costs
        local = torch.where(self._mine, local, 0)
        self._chunk = chunk(product, head, local, costs)
        self._z = self._chunk.at(local[:, None]).squeeze(
            1
        )  # [c] of the target, or of the first column
        self._log_c = (
            None if costs is None else costs.table[:, 0].to(self._z.dtype).log()[costs.which]
        )

    def at(self, ids: Tensor) -> Tensor:
        """This rank's part of ``statistics`` needs no other logits, and soft targets are refused."""
        return self._z[:, None]

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        _, others, log_w = (
            self._chunk.statistics()
        )  # relative to the greatest of this rank's others
        self._own_top = self._chunk.top
        top = torch.where(self._mine, self._own_top, torch.maximum(self._own_top, self._z))
        first = torch.where(self._mine, -torch.inf, self._z - top)
        others = torch.logaddexp(others + (self._own_top - top), first)
        if log_w is None or self._log_c is None:
            self.top = self._maximum(top)
            parts = [torch.exp(others + (top - self.top))]
        else:
            log_w = torch.logaddexp(log_w + (self._own_top - top), first + self._log_c)
            self.top, top_w = self._maximum(torch.stack([top, log_w + top]))
            lead = torch.where(
                top_w > -torch.inf, top_w - self.top, 0.0
            )  # log w may lie far below: a maximum of its own
            down = top - self.top
            parts = [torch.exp(others + down), torch.exp(log_w + down - lead)]
        sums = torch.stack([*parts, torch.where(self._mine, self._z - self.top, 0.0)])
        self._reduce(sums, dist.ReduceOp.SUM)
        return sums[-1], sums[0].log(), None if log_w is None else lead + sums[1].log()

    def gradient(
        self, others: Tensor, log_w: Tensor | None, alpha: Tensor, beta: Tensor, g_y: Tensor
    ) -> Tensor:
        down = self._z - self.top
        first = torch.where(others > -torch.inf, alpha * torch.exp(down - others), 0.0)
        if self._log_c is not None and log_w is not None:
            first += torch.where(beta != 0, beta * torch.exp(down + self._log_c - log_w), 0.0)
        lift = self.top - self._own_top
        return self._chunk.gradient(
            others + lift,
            None if log_w is None else log_w + lift,
            alpha,
            beta,
            torch.where(self._mine, g_y, first),
        )

    def _maximum(self, values: Tensor) -> Tensor:
        return self._reduce(values.clone(), dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, how: Any) -> Tensor:
        if values.numel():
            dist.all_reduce(values, how, group=self._group)
        return values
