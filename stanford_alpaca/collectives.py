"""PyTorch's collectives on one tensor, by the names that the installed version has for them; and the ranks' store."""

import secrets
import time
from functools import lru_cache

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store
from torch.distributed.distributed_c10d import _get_default_store

POLL = 0.2  # seconds between looks at the store, once another rank takes long
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name warns from 2.13 on
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(own: Tensor, group: ProcessGroup | None = None) -> Tensor:  # [n, ...] -> [R n, ...]
    """The equally many rows of all ranks, in their order."""
    everyone = own.new_empty(dist.get_world_size(group) * len(own), *own.shape[1:])
    _all_gather(everyone, own.contiguous(), group=group)
    return everyone


def reduce_scatter(everyone: Tensor, group: ProcessGroup | None = None) -> Tensor:  # [R n, ...] -> [n, ...]
    """This rank's rows of the sum over ranks."""
    own = everyone.new_empty(len(everyone) // dist.get_world_size(group), *everyone.shape[1:])
    _reduce_scatter(own, everyone.contiguous(), group=group)
    return own


def fresh_store(name: str) -> Store:
    """The part of the process group's store with this name, which nobody has written to yet.

    torchrun's store outlives the ranks: after a restart it still holds what those before them have said. All ranks have to call
    this; one broadcast the first time.
    """
    return PrefixStore(f"{_attempt(dist.group.WORLD)}/{name}", _get_default_store())


def await_key(store: Store, key: str) -> None:
    """Returns when a rank has set it, however long that takes."""
    pause = 0.01
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, POLL)


@lru_cache(maxsize=1)
def _attempt(group: ProcessGroup | None) -> str:
    """A word of this process group's own."""
    word = [secrets.token_hex(8)]
    dist.broadcast_object_list(word, src=0)
    return word[0]
