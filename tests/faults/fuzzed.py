"""Fuzzed files and command lines, each in a process of its own.

Each is accepted, or refused in one line, in time.
"""

from pathlib import Path
from random import Random

from tests.faults.harness import Case, Lost, case
from tests.faults.world import World
from tests.ranks import RanksFailed, run_ranks


def try_one(kind: str, seed: int, folder: Path) -> str:
    """Returns the outcome of one case. It is called in the child process."""
    from tests.faults.fuzz import check_command, check_file, fuzz_argv, fuzz_json, outcome
    from tests.faults.fuzz_folders import KINDS, fuzz

    folder.mkdir(parents=True)
    if kind in KINDS:
        return outcome(fuzz(kind, seed, folder))
    return outcome(
        check_file(fuzz_json(seed, folder))
        if kind == "data"
        else check_command(fuzz_argv(seed, folder))
    )


def fuzzed(rng: Random) -> list[Case]:
    def ends_well(world: World, out: Path, kind: str, seed: int) -> None:
        try:
            run_ranks(1, try_one, kind, seed, out, launched=False)
        except RanksFailed as failed:
            raise Lost(str(failed)) from None

    seeds = rng.sample(range(2**32), 1000)
    kinds = ("data", "command line", "yaml", "template", "model", "adapter", "archive")
    return [
        case(f"{kinds[i % 7]} of seed {seed}", ends_well, kinds[i % 7], seed)
        for i, seed in enumerate(seeds)
    ]


ROWS = {"fuzzed inputs": fuzzed}
