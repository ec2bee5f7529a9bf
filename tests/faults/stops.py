"""A scheduler's signal: the run saves what it has, ends, and can be resumed from there."""

from pathlib import Path
from random import Random

from tests.faults.harness import (
    DDP,
    FSDP,
    PLAIN,
    Case,
    Setting,
    case,
    check,
    exact,
    seen,
    valid_checkpoints,
)
from tests.faults.hooks import Fault
from tests.faults.world import World

STOPPED = 75


def sigterm(rng: Random) -> list[Case]:
    """Sends a scheduler's signal to all ranks or to one."""

    def stopped(
        world: World,
        out: Path,
        setting: Setting,
        where: str,
        at: int,
        ranks: tuple[int, ...] | None,
    ) -> None:
        changes = (
            {"eval_path": world.folder / "held.json", "eval_strategy": "steps", "eval_steps": 2}
            if where == "evaluation"
            else {}
        )
        usual = world.reference(setting, **changes)
        ended = world.run(setting, out, Fault("term", where, at, ranks), **changes)
        check(set(ended.statuses) == {STOPPED}, f"statuses {ended.statuses}\n{ended.text[-2000:]}")
        check(not ended.errors() and "Traceback" not in ended.text, ended.text[-2000:])
        there = valid_checkpoints(out)
        last = 0 if where == "load" else max(step for step, _ in seen(out))
        check(there[:1] == [f"checkpoint-{last}"] * (last > 0), f"{there} after step {last}")
        resumed = world.finish(setting, out, **changes)
        check(not there or there[0] in resumed.text, f"it did not go on from {there[:1]}")
        exact(usual, out)

    cases = []
    for setting in (PLAIN, DDP, FSDP):
        for where, most in (("step", 10), ("save", 2), ("evaluation", 6), ("fetch", 10)):
            for ranks in (None, (setting.ranks - 1,)):
                at = rng.randrange(most)
                point = "load" if setting is PLAIN and where == "fetch" and ranks is None else where
                to = "all ranks" if ranks is None else f"rank {ranks[0]}"
                at = 0 if point == "load" else at
                cases.append(
                    case(
                        f"{setting.name}, {point} {at}, to {to}", stopped, setting, point, at, ranks
                    )
                )
    return cases


ROWS = {"SIGTERM": sigterm}
