"""The loss with output layer and costs sharded by vocabulary: ranks exchange hidden states.

No weights are exchanged. Every rank multiplies the tokens of all ranks with its own rows of the
output layer (Megatron-LM, arXiv 1909.08053, section 3), in the chunks of chunked.py. Each statistic
is a sum of non-negative terms over the vocabulary, so the ranks' partial sums add up. The rest of
the mathematics does not change.

Collectives of one call on R ranks. Let n be the most supervised tokens that a rank has, N = R n,
H the width of the hidden states and D that of the costs:

    forward    all-gather 1 int64 of each rank
               all-gather [n, H] hidden states in their dtype, n targets (int64) and, if given,
               n token weights
               each chunk of c tokens with u different targets:
               all-reduce [u, D] rows of the costs, max [2, c] and sum [3, c] (float32)
    backward   reduce-scatter [N, H] gradients of the hidden states (float32)

Without costs, no rows are reduced, and the max and the sum have one row less. Without gradients
there is no backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard

from stanford_alpaca.cost import Cost, CostRows, ShardedCost
from stanford_alpaca.distributed.collectives import all_gather, reduce_scatter
from stanford_alpaca.losses.backends import chunked, torch_kernels
from stanford_alpaca.losses.backends.autograd import first_derivatives
from stanford_alpaca.losses.backends.sampling import Sampled
from stanford_alpaca.losses.types import (
    Chunk,
    Draws,
    Head,
    Kernels,
    LossOfStats,
    SoftTargets,
    TokenStats,
)


def linear_loss(
    hidden: Tensor,  # [n, H] this rank's tokens; n differs between ranks
    head: Head,  # its parameters are DTensors, the weight [V, H] sharded by rows
    targets: Tensor | SoftTargets,  # [n]
    cost: Cost | None,  # an identity cost, or one sharded as the head is
    objective: LossOfStats,
    reduction: str,  # "sum"
    token_weights: Tensor | None = None,
    kernels: Kernels = torch_kernels,
    sampled: Sampled | None = None,
) -> tuple[Tensor, TokenStats]:
    """Computes ``reference.linear_loss`` of this rank's tokens.

    All ranks have to call it together, and its backward pass too if they train. The gradient that
    arrives must be equal on all ranks, as it is after a division by the global count of targets.
    The gradient of the head's rows is the mean over ranks, as FSDP makes it for other weights. It
    is complete, and nothing is left to be reduced.

    Raises:
        ValueError: reduction "none", soft targets, costs that are not sharded, or a head that is
            not sharded by vocabulary.
    """
    if reduction != "sum":
        raise ValueError("a sharded output layer has no unreduced loss: use reduction mean or sum")
    if isinstance(targets, SoftTargets):
        advice = "gather it, or leave the teacher out"
        raise ValueError(f"a sharded output layer takes no soft targets: {advice}")
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
    everyone, goals = tokens.gather(hidden), tokens.gather(targets)
    weights = None if token_weights is None else tokens.gather(token_weights)
    for part in (weight, bias):
        if part is not None and part.requires_grad:
            part.register_hook(lambda grad: grad / ranks)
    total, stats = chunked.linear_loss(
        everyone,
        head._replace(weight=weight, bias=bias),
        goals,
        cost,
        objective,
        "sum",
        weights,
        kernels=_Kernels(kernels, columns, group),
        sampled=sampled,
    )
    own = slice(tokens.start, tokens.start + len(hidden))
    stats = TokenStats(stats.nll[own], None if stats.log_emo is None else stats.log_emo[own])
    with torch.no_grad():
        loss = objective(*stats)
        loss = (loss if token_weights is None else loss * token_weights).sum()
    # the value of this rank's loss with the gradient of all ranks' loss
    return loss + (total - total.detach()), stats


def _local(head: Head, device: torch.device) -> tuple[Tensor, Tensor | None, dist.ProcessGroup]:
    """Returns this rank's rows of weight and bias, and the process group that shares them.

    Offloaded rows are moved to the device.
    """
    weight = head.weight
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        raise ValueError(
            "wanted an output layer sharded by vocabulary over one group of ranks, "
            f"not {type(weight).__name__}"
        )
    bias: Any = head.bias
    bias = None if bias is None else bias.to_local().to(device)
    return weight.to_local().to(device), bias, weight.device_mesh.get_group()


class _Tokens:
    """The supervised tokens of all ranks: how many each rank has, and where this rank's start.

    Making one takes one all-gather and one wait for the device.
    """

    def __init__(self, count: int, group: dist.ProcessGroup, device: torch.device):
        counts = all_gather(torch.tensor([count], device=device), group)
        numbers = counts.tolist()
        self.group, self.most, self.start = (
            group,
            max(numbers),
            sum(numbers[: dist.get_rank(group)]),
        )
        # [R * most] False for padding
        self._keep = (torch.arange(self.most, device=device) < counts[:, None]).flatten()

    def gather(self, own: Tensor) -> Tensor:  # [n, ...] -> [N, ...]
        """Returns the rows of all ranks, in the order of the ranks.

        Takes one all-gather of ``most`` rows from each rank, and nothing if no rank has tokens.
        """
        if self.most == 0:
            return own
        padded = own.new_zeros(self.most, *own.shape[1:]).index_copy(
            0, torch.arange(len(own), device=own.device), own
        )
        return _GatherRows.apply(padded, self.group)[self._keep]


class _GatherRows(torch.autograd.Function):
    """Gathers [n, ...] of each rank to [R n, ...] on all ranks.

    Backward sums the ranks' gradients of each row, in float32 (float64 for float64 gradients).
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(own, group)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple:
        exact = grad if grad.dtype == torch.float64 else grad.float()
        return reduce_scatter(exact, ctx.group).to(grad.dtype), None


class _Kernels:
    """The kernels that serve one shard of the vocabulary.

    Each rank has ``columns`` tokens of the vocabulary; the last ranks may have fewer.
    """

    def __init__(self, kernels: Kernels, columns: int, group: dist.ProcessGroup):
        # equal on all ranks, so that all ranks make the same chunks
        self.CHUNK_LOGITS, self.COLUMNS = kernels.CHUNK_LOGITS, columns
        # a slice would have collectives of its own
        self.SLICE_LOGITS: dict[str, int] = {}
        self._kernels, self._start, self._group = kernels, columns * dist.get_rank(group), group

    def Chunk(
        self, product: Tensor, head: Head, targets: Tensor, costs: CostRows | None
    ) -> "_Chunk":
        chunk = self._kernels.Chunk
        return _Chunk(chunk, self._start, self._group, product, head, targets, costs)


class _Chunk:
    """A Chunk of logits that are sharded over the ranks.

    It has this rank's columns. ``statistics`` covers the whole vocabulary, and ``gradient`` is that
    of this rank's columns. Where another rank has the target, the kernels are given this rank's
    first column as the target. They leave that column out of their sums, so it is added here.
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
        # [c] the logit of the target, or of the first column
        self._z = self._chunk.at(local[:, None]).squeeze(1)
        self._log_c = (
            None if costs is None else costs.table[:, 0].to(self._z.dtype).log()[costs.which]
        )

    def at(self, ids: Tensor) -> Tensor:
        """Returns the logits that were kept, whatever the ids: no others are needed here.

        Only soft targets would need others, and they are refused.
        """
        return self._z[:, None]

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        # relative to this rank's greatest logit other than the target's
        _, others, log_w = self._chunk.statistics()
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
            # log w may lie far below the logits, so it has a maximum of its own
            lead = torch.where(top_w > -torch.inf, top_w - self.top, 0.0)
            down = top - self.top
            parts = [torch.exp(others + down), torch.exp(log_w + down - lead)]
        sums = torch.stack([*parts, torch.where(self._mine, self._z - self.top, 0.0)])
        self._reduce(sums, dist.ReduceOp.SUM)
        return sums[-1], sums[0].log(), None if log_w is None else lead + sums[1].log()

    def gradient(
        self, others: Tensor, log_w: Tensor | None, alpha: Tensor, beta: Tensor, g_y: Tensor
    ) -> Tensor:
        return self._chunk.gradient(*self._own(others, log_w, alpha, beta, g_y))

    def sample(self, draws: Draws, *vectors: Any) -> tuple[Tensor, Tensor] | None:
        return self._chunk.sample(draws, *self._own(*vectors))

    def _own(
        self, others: Tensor, log_w: Tensor | None, alpha: Tensor, beta: Tensor, g_y: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Returns the same for this rank's columns, relative to their own greatest logit."""
        down = self._z - self.top
        first = torch.where(others > -torch.inf, alpha * torch.exp(down - others), 0.0)
        if self._log_c is not None and log_w is not None:
            first += torch.where(beta != 0, beta * torch.exp(down + self._log_c - log_w), 0.0)
        lift = self.top - self._own_top
        return (
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
