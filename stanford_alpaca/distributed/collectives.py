"""Collectives on one tensor, under the names that the installed PyTorch has for them."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# the older names warn from PyTorch 2.13 on
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(own: Tensor, group: ProcessGroup | None = None) -> Tensor:  # [n, ...] -> [R n, ...]
    """Returns the rows of all ranks in rank order. Each rank gives the same number of rows."""
    everyone = own.new_empty(dist.get_world_size(group) * len(own), *own.shape[1:])
    _all_gather(everyone, own.contiguous(), group=group)
    return everyone


def reduce_scatter(
    everyone: Tensor, group: ProcessGroup | None = None
) -> Tensor:  # [R n, ...] -> [n, ...]
    """Returns this rank's rows of the sum over the ranks."""
    own = everyone.new_empty(len(everyone) // dist.get_world_size(group), *everyone.shape[1:])
    _reduce_scatter(own, everyone.contiguous(), group=group)
    return own
