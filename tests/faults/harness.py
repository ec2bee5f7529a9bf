"""What the rows share: settings of a run, cases, and the comparison of two runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.faults.hooks import beside

if TYPE_CHECKING:
    from tests.faults.world import World


class Lost(AssertionError):
    """Something that must hold did not."""


class NotHere(Exception):
    """This machine does not let the harness inject the fault."""


def check(holds: Any, message: str) -> None:
    if not holds:
        raise Lost(message)


@dataclass(frozen=True)
class Setting:
    """A kind of training run: its number of ranks and its flags."""

    name: str
    ranks: int
    flags: tuple[str, ...] = ()

    @property
    def launched(self) -> bool:
        return self.ranks > 1 or "--engine" in self.flags


ADAPTER = ("--lora", "True", "--lora_dropout", "0.1")
PLAIN, LORA, DDP = Setting("plain", 1), Setting("lora", 1, ADAPTER), Setting("ddp", 2)
FSDP, ZERO2 = Setting("fsdp", 2, ("--engine", "fsdp")), Setting("zero2", 2, ("--engine", "zero2"))
FSDP_LORA, DDP_LORA = (
    Setting("fsdp-lora", 2, (*FSDP.flags, *ADAPTER)),
    Setting("ddp-lora", 2, ADAPTER),
)
SETTINGS = (PLAIN, LORA, DDP, FSDP, FSDP_LORA, ZERO2)


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Args:
        statuses: exit statuses by rank; a negative one is minus the signal that killed the rank.
        text: what the ranks printed.
        rest_took: seconds from the end of the first rank to the end of the last one.
    """

    statuses: list[int]
    text: str
    rest_took: float

    def errors(self) -> list[str]:
        return [
            line
            for line in self.text.splitlines()
            if line.startswith("error: ") and " lost another one " not in line
        ]


Check = Callable[["World", Path], None]


@dataclass(frozen=True)
class Case:
    """One injection: its description, and the check, which raises if something does not hold.

    The check may use ``out`` and the files beside it.
    """

    what: str
    holds: Check


def case(what: str, function: Callable, *args: Any, **kwargs: Any) -> Case:
    """Returns ``function(world, out, *args, **kwargs)`` as a case."""
    return Case(what, lambda world, out: function(world, out, *args, **kwargs))


Row = Callable[[Random], list[Case]]


def exact(one: Path, two: Path, over_ranks: bool = False) -> None:
    """Raises Lost unless two runs ended in equal states and saw equal rows in each step."""
    from safetensors.torch import load_file

    from stanford_alpaca.checkpoint import manifest
    from tests.faults.state import differences

    last = [manifest.checkpoints(out)[0] for out in (one, two)]
    check(
        last[0].name == last[1].name, f"the last checkpoints are {last[0].name} and {last[1].name}"
    )
    found = differences(*last)
    check(not found, f"{last[0].name} differs in {len(found)} values: {', '.join(found[:5])}")
    for file in one.glob("*.safetensors"):
        a, b = load_file(file), load_file(two / file.name)
        check(
            a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a), f"{file.name} differs"
        )
    a, b = seen(one, over_ranks), seen(two, over_ranks)
    check(a.keys() == b.keys(), f"steps {sorted(a)} and {sorted(b)}")
    check(a == b, f"other rows in {[step for step in sorted(a) if a[step] != b[step]][:3]}")


def seen(out: Path, over_ranks: bool = False) -> dict[Any, list]:
    """Returns the rows that each step saw, each time that the step was made.

    The keys are pairs of step and rank. With ``over_ranks`` they are steps, and the rows of all
    ranks are joined.
    """
    rows: dict[Any, dict[int, set]] = {}
    for file in out.parent.glob(f"{out.name}.seen*"):
        rank = int(file.name.rpartition("seen")[2])
        for line in file.read_text().splitlines():
            step, ids = json.loads(line)
            rows.setdefault(step, {}).setdefault(rank, set()).add(tuple(ids))
    assert beside(out, "seen0").exists()
    if over_ranks:
        return {
            step: sorted(row for ids in by_rank.values() for each in ids for row in each)
            for step, by_rank in rows.items()
        }
    return {
        (step, rank): sorted(ids) for step, by_rank in rows.items() for rank, ids in by_rank.items()
    }


def valid_checkpoints(out: Path) -> list[str]:
    """Returns the names of the checkpoints, the newest first. Raises Lost if one is damaged."""
    from stanford_alpaca.checkpoint import manifest

    found = manifest.checkpoints(out)
    for folder in found:
        check(not manifest.problems(folder), f"{folder.name}: {manifest.problems(folder)}")
    return [folder.name for folder in found]
