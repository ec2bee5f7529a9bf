"""Resuming: from every step, with other numbers of processes, and beside another run."""

from pathlib import Path
from random import Random
from typing import Any

from stanford_alpaca.checkpoint import manifest
from tests.faults.harness import (
    ADAPTER,
    DDP,
    DDP_LORA,
    FSDP,
    FSDP_LORA,
    LORA,
    PLAIN,
    ZERO2,
    Case,
    Setting,
    case,
    check,
    exact,
    seen,
)
from tests.faults.hooks import Fault, beside
from tests.faults.processes import wait_until
from tests.faults.stops import STOPPED
from tests.faults.world import World
from tests.helpers import steps

LOSS = 1e-5  # greatest absolute difference of a step's loss between equal runs


def resume_everywhere(rng: Random) -> list[Case]:
    """Compares a run that saves after each of nine steps with runs resumed from its first eight."""

    def goes_on(world: World, out: Path, setting: Setting, accumulation: int, step: int) -> None:
        micro = GLOBAL // accumulation // setting.ranks
        changes: dict[str, Any] = {
            "max_steps": 9,
            "save_steps": 1,
            "save_total_limit": None,
            "global_batch": GLOBAL,
        }
        changes |= {"per_device_train_batch_size": micro}
        usual = world.reference(setting, **changes)
        world.copy(usual, out, only=[step])
        world.finish(setting, out, **changes)
        exact(usual, out)

    settings = [
        (setting, n) for setting in (PLAIN, LORA, DDP, DDP_LORA, FSDP, FSDP_LORA) for n in (1, 3)
    ]
    chosen = [(setting, n, step) for setting, n in settings for step in range(1, 9)]
    chosen += [(ZERO2, n, step) for n, step in [(1, 2), (1, 7), (3, 1), (3, 5)]]
    return [
        case(f"{setting.name}, accumulation {n}, step {step}", goes_on, setting, n, step)
        for setting, n, step in chosen
    ]


GLOBAL = 6  # divisible by 1 and 2 processes times 1 and 3 micro-batches


def other_sizes(rng: Random) -> list[Case]:
    """Stops runs after two and four steps, and resumes them with other numbers of processes."""

    def resized(
        world: World,
        out: Path,
        flags: tuple[str, ...],
        sizes: tuple[int, ...],
        changes: dict[str, Any],
    ) -> None:
        changes = {"model_name_or_path": world.folder / "sure", "global_batch": 8, **changes}
        usual = world.reference(
            Setting("sizes", sizes[0], flags), **changes, per_device_train_batch_size=2
        )
        for part, ranks in enumerate(sizes):
            setting = Setting("sizes", ranks, flags)
            micro = 8 // ranks // (2 if part else 1) // (2 if ranks == 1 else 1)
            accumulation = 8 // ranks // micro
            fault = None if part == 2 else Fault("term", "step", 2 * accumulation - 1)
            ended = world.run(setting, out, fault, **changes, per_device_train_batch_size=micro)
            wanted = 0 if part == 2 else STOPPED
            check(
                set(ended.statuses) == {wanted},
                f"{ranks} processes: statuses {ended.statuses}\n{ended.text[-2000:]}",
            )
            there = manifest.checkpoints(out)[0].name
            check(there == f"checkpoint-{2 * part + 2}", f"{ranks} processes: stopped at {there}")
        a, b = seen(usual, over_ranks=True), seen(out, over_ranks=True)
        check(
            a == b, f"other rows in steps {[step for step in sorted(a) if a[step] != b.get(step)]}"
        )
        for one, two in zip(steps(usual), steps(out), strict=True):
            check(
                abs(one["loss"] - two["loss"]) <= LOSS,
                f"step {one['step']}: loss {one['loss']} and {two['loss']}",
            )

    cases = []
    engine, lora = ("--engine", "fsdp"), ADAPTER[:2]
    for sizes in ((2, 1, 4), (4, 2, 1), (1, 4, 2)):
        for flags in ((), engine, lora, (*engine, *lora)):
            name = " ".join(flags) or "as launched"
            cases.append(
                case(f"{' -> '.join(map(str, sizes))} processes, {name}", resized, flags, sizes, {})
            )
    return cases


def two_runs(rng: Random) -> list[Case]:
    """Starts a second run in the folder while the first one waits in a step."""

    def refused(world: World, out: Path, setting: Setting, at: int) -> None:
        def second() -> None:
            wait_until(lambda: beside(out, "acted0").exists())
            before = manifest.list_saved(out)
            ended = world.run(setting, out)
            beside(out, "go").touch()
            check(
                set(ended.statuses) == {2},
                f"statuses of the second {ended.statuses}\n{ended.text[-2000:]}",
            )
            check(
                len(set(ended.errors())) == 1 and "Traceback" not in ended.text, ended.text[-2000:]
            )
            check(manifest.list_saved(out) == before, "the second has changed the folder")

        world.finish(setting, out, fault=Fault("wait", "fetch", at), meanwhile=second)
        exact(world.reference(setting), out)

    return [
        case(f"{setting.name}, in step {at}", refused, setting, at)
        for setting in (PLAIN, DDP)
        for at in (1, 7)
    ]


ROWS = {
    "resume at every step": resume_everywhere,
    "other world sizes": other_sizes,
    "two runs in a folder": two_runs,
}
