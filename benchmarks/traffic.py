"""Counts the collectives of a rank and their bytes, as PyTorch runs them.

    with Traffic() as traffic:
        step()
    traffic.calls, traffic.bytes   # by kind of collective

Bytes are those that a rank receives in a ring: (R - 1) / R of the whole for an all-gather or a
reduce-scatter, twice that for an all-reduce, and all of it for a broadcast. It sees the calls of
this thread. On a CPU these are all calls, backward passes included.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "scatter": "scatter",
    "gather": "gather",
    "alltoall_base": "all-to-all",
    "barrier": "barrier",
}


class Traffic(TorchDispatchMode):
    """Counts the collectives of this process inside the ``with`` block.

    Attributes:
        calls: number of calls of each kind.
        bytes: bytes that this rank received, of each kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Returns the bytes of all kinds."""
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS.get(func._schema.name.split("::")[1].removesuffix("_"), func._schema.name)
            self.calls[kind] += 1
            self.bytes[kind] += _received(kind, args)
        return func(*args, **(kwargs or {}))


def _received(kind: str, args: tuple) -> int:
    """Returns the bytes that a rank receives in a ring.

    The whole is the larger side of a collective: the gathered or scattered list or tensor.
    """
    ranks = torch.distributed.get_world_size()
    sides = [
        sum(t.numel() * t.element_size() for t in tree_leaves(arg) if isinstance(t, torch.Tensor))
        for arg in args
    ]
    whole = max(sides, default=0)
    if kind == "broadcast":
        return whole if torch.distributed.get_rank() else 0
    return whole * (ranks - 1) // ranks * (2 if kind == "all-reduce" else 1)
