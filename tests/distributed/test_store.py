"""Tests loading in turn.

The other ranks wait past any timeout, one failure ends all of them, and ranks with different data
are reported.
"""

import time
from datetime import timedelta
from pathlib import Path

import torch

from stanford_alpaca.distributed import store as turns
from stanford_alpaca.distributed.store import fresh_store, load_in_turn
from stanford_alpaca.errors import UserError
from tests.ranks import run_ranks, start_gloo

PER_MACHINE = 2


def turn(folder: str, failing: int | None, odd: int | None) -> str | tuple[str, list[str]]:
    """Loads in turn on one rank.

    Returns its data and the names of the ranks that loaded before it, or the text of its error.
    """
    torch.distributed.init_process_group("gloo")
    torch.distributed.distributed_c10d._set_pg_timeout(
        timedelta(seconds=1), torch.distributed.group.WORLD
    )
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def load() -> tuple[str, list[str]]:
        before = sorted(file.name for file in Path(folder).iterdir())
        if failing is not None:
            # Ranks without the error would sleep, so that the failing rank speaks first.
            turns.time.sleep = lambda seconds: None
        if rank == failing:
            raise UserError("data.json: no such file")
        if failing is None and rank % PER_MACHINE == 0:
            time.sleep(2)  # tokenizing takes longer than the process group's timeout
        (Path(folder) / str(rank)).touch()
        return ("other" if rank == odd else "data"), before

    try:
        return load_in_turn(load, lambda data: data[0], rank, rank % PER_MACHINE, ranks)
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def test_the_first_rank_of_each_machine_loads_while_the_others_wait_past_the_timeout(tmp_path):
    results = run_ranks(4, turn, str(tmp_path), None, None)
    assert [data for data, _ in results] == ["data"] * 4
    before = [seen for _, seen in results]
    assert "1" not in before[0] and "3" not in before[2]
    assert "0" in before[1] and "2" in before[3]


def test_the_first_rank_says_what_another_machine_failed_with(tmp_path):
    first, *others = run_ranks(4, turn, str(tmp_path), 2, None)
    assert first == "UserError: data.json: no such file"
    assert others == ["SystemExit: 2", "UserError: data.json: no such file", "SystemExit: 2"]


def test_ranks_with_different_data_are_an_error(tmp_path):
    (message,) = set(run_ranks(2, turn, str(tmp_path), None, 1))
    assert message.startswith("UserError: rank 1 has other training data than rank 0")


def look_after_a_restart() -> tuple[bool, bool]:
    """Returns whether a rank finds what another one wrote to the store.

    The second value is the same after a restart: in a new process group on the same store.
    """
    start_gloo()
    if torch.distributed.get_rank() == 0:
        fresh_store("word").set("said", "before")
    else:
        fresh_store("word")
    torch.distributed.barrier()
    before = fresh_store("word").check(["said"])
    turns._attempt.cache_clear()
    return before, fresh_store("word").check(["said"])


def test_what_ranks_said_before_a_restart_is_not_heard_after_it():
    assert run_ranks(2, look_after_a_restart) == [(True, False)] * 2
