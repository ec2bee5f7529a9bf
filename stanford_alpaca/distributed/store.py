"""Lets ranks wait for one another through the process group's store.

A collective would not do, because it has a timeout, and tokenizing may take any time.
"""

import pickle
import secrets
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, ProcessGroup, Store, is_initialized
from torch.distributed.distributed_c10d import _get_default_store

from stanford_alpaca.console import is_main_process
from stanford_alpaca.errors import UserError, first_line

T = TypeVar("T")
OK, FAILED = "ok ", "failed "
POLL = 0.2  # longest pause between looks at the store, in seconds


def load_in_turn(
    load: Callable[[], T], digest: Callable[[T], str], rank: int, local_rank: int, world_size: int
) -> T:
    """Returns what ``load`` returns, called on the first rank of every machine, then on its others.

    The others wait for the first one, and then load from the cache that it has filled. Several
    ranks need a process group, whose store holds the outcomes. There is no collective, except that
    of ``fresh_store``. The ranks of a machine must have consecutive numbers.

    Raises:
        UserError: on every rank, if ranks loaded data with different digests; on rank 0, if another
            rank failed.
        SystemExit: if another rank failed, on the ranks that have no error of their own.
    """
    if world_size == 1:
        return load()
    store = fresh_store("load_in_turn")
    try:
        if local_rank > 0:
            _outcome_of(rank - local_rank, store)
        try:
            data = load()
            mine = digest(data)
        except BaseException as error:
            what = (
                ""
                if isinstance(error, UserError)
                else f"rank {rank} failed, {type(error).__name__}: "
            )
            store.set(str(rank), FAILED + what + first_line(error))
            raise
        store.set(str(rank), OK + mine)
        digests = [_outcome_of(other, store) for other in range(world_size)]
    except DistError:  # rank 0, which holds the store, has ended and said why
        sys.exit(2)
    if len(set(digests)) > 1:
        odd = next(other for other in range(world_size) if digests[other] != digests[0])
        raise UserError(
            f"rank {odd} has other training data than rank 0: "
            "give all machines the same files, and clear their caches"
        )
    return data


def _outcome_of(rank: int, store: Store) -> str:
    """Waits for a rank, and returns the digest of its data."""
    await_key(store, str(rank))
    outcome = store.get(str(rank)).decode()
    if outcome.startswith(OK):
        return outcome
    if is_main_process():
        raise UserError(outcome.removeprefix(FAILED))
    # The first rank to exit takes the others down. Wait, so that a rank that knows more can report.
    time.sleep(5)
    sys.exit(2)


def share_from_rank_0(what: str, make: Callable[[], T] | None) -> T:
    """Returns on all ranks what ``make`` returns on rank 0. The other ranks give None.

    The value goes through the process group's store, because reading a large model takes longer
    than a collective may. ``what`` has to be different for each call.

    Raises:
        UserError: on all ranks, if ``make`` raised it.
    """
    if make is not None and not is_initialized():  # one process
        return make()
    store = fresh_store(f"share {what}")
    if make is None:
        try:
            await_key(store, "outcome")
            value, error = pickle.loads(store.get("outcome"))
        except DistError:  # rank 0, which holds the store, has ended and said why
            sys.exit(2)
    else:
        value, error = None, None
        try:
            value = make()
        except UserError as refused:
            error = refused
        store.set("outcome", pickle.dumps((value, error)))  # type: ignore[arg-type]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def fresh_store(name: str) -> Store:
    """Returns the part of the process group's store with this name. Nobody has written to it yet.

    torchrun's store outlives the ranks: after a restart it still holds what the ranks before wrote.
    All ranks have to call this. Collectives: one broadcast, at the first call.
    """
    return PrefixStore(f"{_attempt(dist.group.WORLD)}/{name}", _get_default_store())


def await_key(store: Store, key: str) -> None:
    """Waits until a rank has set the key, however long that takes."""
    pause = 0.01
    while not store.check([key]):
        time.sleep(pause)
        pause = min(2 * pause, POLL)


@lru_cache(maxsize=1)
def _attempt(group: ProcessGroup | None) -> str:
    """Returns a random word that no other process group has."""
    word = [secrets.token_hex(8)]
    dist.broadcast_object_list(word, src=0)
    return word[0]
