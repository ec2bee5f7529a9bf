"""The cost embedding in shards: each rank keeps 1/R of the rows between uses."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stanford_alpaca.cost.cache import CostRows
from stanford_alpaca.cost.embedding import CostEmbedding, transport_costs
from stanford_alpaca.cost.types import Cost
from stanford_alpaca.distributed.collectives import all_gather


class ShardedCost:
    """This rank's rows of a CostEmbedding that is sharded over the ranks of a group.

    Each rank has ceil(V / R) rows and the last ones fewer, as FSDP2 shards a parameter.

    Args:
        cost: the whole embedding, equal on all ranks. This rank's rows are copied.
        group: the ranks that share it; None for all ranks.
        device: where the rows are kept and the collectives run.
        from_rank_0: whether rank 0 alone has the rows and the others' are on the meta device. This
            takes one broadcast of V / R rows for each rank.
    """

    def __init__(
        self,
        cost: CostEmbedding,
        group: ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        from_rank_0: bool = False,
    ):
        if cost.rows is None:
            raise ValueError("an identity cost has no rows to shard")
        self._share(len(cost.rows), group)
        own = slice(self.start, self.start + self.per_rank)
        if not from_rank_0:
            self.rows = cost.rows[own].to(device, copy=True)  # [V / R, D]
            return
        # the last ranks may have no rows
        self.rows = cost.rows.new_empty(0, cost.rows.shape[1], device=device)
        rank = torch.distributed.get_rank(group)
        for owner, part in enumerate(cost.rows.split(self.per_rank)):
            part = _from_rank_0(part, device, group)
            if owner == rank:
                self.rows = part

    @classmethod
    def of_part(
        cls, part: CostEmbedding, vocab_size: int, group: ProcessGroup | None = None
    ) -> "ShardedCost":
        """Makes a shard from an embedding of this rank's rows alone."""
        self = cls.__new__(cls)
        self._share(vocab_size, group)
        assert part.rows is not None
        self.rows = part.rows
        return self

    def _share(self, vocab_size: int, group: ProcessGroup | None) -> None:
        self.group, self.vocab_size = group, vocab_size
        self.per_rank = -(-vocab_size // torch.distributed.get_world_size(group))
        self.start = self.per_rank * torch.distributed.get_rank(group)

    def to(self, device: torch.device | str) -> "ShardedCost":
        """Moves the rows to the device, in place."""
        self.rows = self.rows.to(device)
        return self

    def check(self, vocab_size: int) -> None:
        """Raises ValueError unless there is one row for every logit."""
        if self.vocab_size != vocab_size:
            raise ValueError(
                f"the cost embedding has {self.vocab_size} rows but there are {vocab_size} logits"
            )

    def gather(self) -> CostEmbedding:
        """Returns the whole embedding.

        Takes one all-gather: each rank receives (R - 1) / R of V * D numbers in the rows' dtype.
        """
        padded = self.rows
        if len(padded) < self.per_rank:
            padded = padded.new_zeros(self.per_rank, self.rows.shape[1])
            padded[: len(self.rows)] = self.rows
        return CostEmbedding.of_rows(all_gather(padded, self.group)[: self.vocab_size])

    def unique_rows(self, targets: Tensor) -> CostRows:  # [n], equal on all ranks
        """Returns the costs of moving from this rank's tokens to the targets.

        The table is [u, V / R] for u different targets. It takes one all-reduce of [u, D], to which
        each rank contributes the rows that it keeps.
        """
        tokens, index = targets.unique(return_inverse=True)
        local = tokens - self.start
        mine = (local >= 0) & (local < len(self.rows))
        wanted = self.rows.new_zeros(len(tokens), self.rows.shape[1])
        wanted[mine] = self.rows[local[mine]]
        if len(tokens):
            torch.distributed.all_reduce(wanted, group=self.group)
        return CostRows(transport_costs(wanted, self.rows), index)


def broadcast_cost(
    cost: CostEmbedding, device: torch.device | str, group: ProcessGroup | None = None
) -> CostEmbedding:
    """Returns rank 0's embedding on all ranks, on the device.

    Takes one broadcast of V * D numbers.
    """
    assert cost.rows is not None
    return CostEmbedding.of_rows(_from_rank_0(cost.rows, device, group))


def _from_rank_0(rows: Tensor, device: torch.device | str, group: ProcessGroup | None) -> Tensor:
    """Broadcasts rank 0's tensor. The other ranks' tensors give its shape and dtype."""
    leads = torch.distributed.get_rank(group) == 0
    rows = rows.to(device, copy=True) if leads else torch.empty_like(rows, device=device)
    torch.distributed.broadcast(rows, group_src=0, group=group)
    return rows


def as_cost(cost: Tensor | Cost | None) -> Cost | None:
    """Converts what the public functions accept into a Cost.

    They accept a [V, D] tensor, a CostEmbedding, a ShardedCost or None. Raises ValueError for
    anything else.
    """
    if not (cost is None or isinstance(cost, Tensor | CostEmbedding | ShardedCost)):
        raise ValueError(
            f"a cost embedding is a tensor [vocabulary, width] or a CostEmbedding, not {cost!r:.40}"
        )
    return CostEmbedding(cost) if isinstance(cost, Tensor) else cost
