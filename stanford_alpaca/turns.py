"""Ranks that wait for one another without a collective, because a collective has a timeout and tokenizing has none."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from torch.distributed import DistError, Store

from stanford_alpaca.collectives import await_key, fresh_store
from stanford_alpaca.console import is_main_process
from stanford_alpaca.errors import UserError, first_line

T = TypeVar("T")
OK, FAILED = "ok ", "failed "


def load_in_turn(load: Callable[[], T], digest: Callable[[T], str], rank: int, local_rank: int, world_size: int) -> T:
    """What ``load`` returns, called on the first rank of every machine while its others wait, then on those, from its cache.

    Needs a process group if there are several ranks, whose store holds the outcomes; no collective. The ranks of a machine
    have consecutive numbers.

    Raises:
        UserError: on every rank, if ``load`` gave ranks data of different digests; on rank 0, what another rank failed with.
        SystemExit: on the ranks that have nothing to say themselves when another one failed.
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
            what = "" if isinstance(error, UserError) else f"rank {rank} failed, {type(error).__name__}: "
            store.set(str(rank), FAILED + what + first_line(error))
            raise
        store.set(str(rank), OK + mine)
        digests = [_outcome_of(other, store) for other in range(world_size)]
    except DistError:  # rank 0, which holds the store, has ended and said why
        sys.exit(2)
    if len(set(digests)) > 1:
        odd = next(other for other in range(world_size) if digests[other] != digests[0])
        raise UserError(
            f"rank {odd} has other training data than rank 0: give all machines the same files, and clear their caches"
        )
    return data


def _outcome_of(rank: int, store: Store) -> str:
    """The digest that a rank came to, once it has."""
    await_key(store, str(rank))
    outcome = store.get(str(rank)).decode()
    if outcome.startswith(OK):
        return outcome
    if is_main_process():
        raise UserError(outcome.removeprefix(FAILED))
    time.sleep(5)  # the first rank to end takes the others down: let one of those speak that know more
    sys.exit(2)
