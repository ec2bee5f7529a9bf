"""Killed processes: all at once, at a change of the disk, or one of several."""

import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from tests.faults.harness import (
    DDP,
    DDP_LORA,
    FSDP,
    FSDP_LORA,
    LORA,
    PLAIN,
    SETTINGS,
    Case,
    Setting,
    case,
    check,
    exact,
    seen,
    valid_checkpoints,
)
from tests.faults.hooks import Fault, beside
from tests.faults.processes import LIMIT, wait_until
from tests.faults.world import ROOT, STEPS, World

KILLED = -9


def equal_runs(rng: Random) -> list[Case]:
    """Runs each setting five times: the result that all other rows compare with is repeatable."""

    def five(world: World, out: Path, setting: Setting) -> None:
        for number in range(5):
            again = out.with_name(f"{out.name}-{number}")
            world.finish(setting, again)
            exact(world.reference(setting), again)

    return [case(f"five runs, {setting.name}", five, setting) for setting in SETTINGS]


def kill_group(rng: Random) -> list[Case]:
    """Kills all ranks at once, some time after the start or after a step has begun.

    Every fifth run is killed a second time.
    """

    def killed(world: World, out: Path, setting: Setting, times: list[tuple[int, float]]) -> None:
        def reached(step: int) -> bool:
            return step == 0 or (
                beside(out, "seen0").exists()
                and max((made for made, _ in seen(out)), default=0) >= step
            )

        for step, seconds in times:
            world.run(
                setting,
                out,
                kill_after=seconds,
                meanwhile=lambda step=step: wait_until(lambda: reached(step)),
            )
        world.finish(setting, out)
        exact(world.reference(setting), out)

    cases = []
    for number in range(100):
        setting = (PLAIN, DDP, FSDP, LORA, DDP_LORA, FSDP_LORA)[number % 6]
        steps = [rng.randrange(STEPS + 1) for _ in range(2 if number % 5 == 4 else 1)]
        times = [(step, round(rng.uniform(0, 0.2 if step else 1.5), 4)) for step in steps]
        words = ", then ".join(
            f"{seconds} s after {f'step {step}' if step else 'the start'}"
            for step, seconds in times
        )
        cases.append(case(f"{setting.name}, {words}", killed, setting, times))
    return cases


def kill_save(rng: Random) -> list[Case]:
    """Kills at changes of the disk, evenly spread from the second save to the third."""

    def killed(world: World, out: Path, setting: Setting, rank: int, share: float) -> None:
        at, what = disk_event(world, setting, rank, share)
        ended = world.run(setting, out, Fault("kill", "disk", at, (rank,)), together=True)
        check(
            KILLED in ended.statuses,
            f"it was not killed at {what}: {ended.statuses}\n{ended.text[-2000:]}",
        )
        ended = world.finish(setting, out)
        check(
            f"checkpoint-{SECOND_SAVE - 2}" in ended.text
            or f"checkpoint-{SECOND_SAVE}" in ended.text,
            f"fresh after {what}",
        )
        exact(world.reference(setting), out)

    counts = [(PLAIN, 0, 24), (LORA, 0, 6), (DDP, 0, 8), (DDP, 1, 4), (FSDP, 0, 10), (FSDP, 1, 8)]
    return [
        case(
            f"{setting.name}, rank {rank}, {number}/{count} through the second save",
            killed,
            setting,
            rank,
            number / count,
        )
        for setting, rank, count in counts
        for number in range(count)
    ]


SECOND_SAVE = 4  # the step of the second of three saves


def disk_event(world: World, setting: Setting, rank: int, share: float) -> tuple[int, str]:
    """Returns the number and the description of a change of the disk.

    ``share`` says how far the change is from the second save (0) to the third save (1).
    """
    run = world.reference(setting, fault=Fault("count", "disk", 0))
    events = beside(run, f"disk{rank}").read_text().splitlines()
    second = [number for number, event in enumerate(events) if f"checkpoint-{SECOND_SAVE}" in event]
    after = [number for number, event in enumerate(events) if "checkpoint-6" in event]
    window = range(second[0], (after or [len(events)])[0])
    number = window[int(share * len(window))]
    return number, events[number]


def kill_one(rng: Random) -> list[Case]:
    """Kills one of two or three ranks. In some cases the launcher starts the ranks again."""

    def killed(world: World, out: Path, setting: Setting, where: str, at: int, rank: int) -> None:
        changes = (
            {"eval_path": world.folder / "held.json", "eval_strategy": "steps", "eval_steps": 2}
            if where == "evaluation"
            else {}
        )
        usual = world.reference(setting, **changes)
        ended = world.run(setting, out, Fault("kill", where, at, (rank,)), **changes)
        check(
            ended.statuses[rank] == KILLED,
            f"rank {rank} was not killed: {ended.statuses}\n{ended.text[-2000:]}",
        )
        check(0 not in ended.statuses, f"a rank ended with 0: {ended.statuses}")
        check(ended.rest_took < 60, f"the others took {ended.rest_took:.0f} s")
        batches = -(-9 // (2 * setting.ranks))  # batches in an evaluation
        steps = {
            "step": at // 2,
            "fetch": at // 2,
            "save": 2 * at,
            "evaluation": 2 * (at // batches + 1),
        }[where]
        there = {folder.name for folder in out.glob("checkpoint-*")}
        wanted = {
            f"checkpoint-{step}"
            for step in (2, 4)
            if step < steps or (step == steps and where != "evaluation")
        }
        check(there <= wanted, f"checkpoints {sorted(there)} after {steps} steps")
        world.finish(setting, out, **changes)
        exact(usual, out)

    cases = []
    three = Setting("ddp of 3", 3)
    for number in range(16):
        setting = (DDP, FSDP, three)[number % 3]
        where, rank = (
            ("step", "save", "fetch", "evaluation")[number % 4],
            rng.randrange(setting.ranks),
        )
        changes = {"step": 12, "fetch": 12, "save": 3, "evaluation": 6}
        at = rng.randrange(changes[where])
        cases.append(
            case(f"{setting.name}, rank {rank}, {where} {at}", killed, setting, where, at, rank)
        )
    for setting, where, at in [(DDP, "step", 7), (FSDP, "save", 1), (DDP, "load", 0)]:
        cases.append(
            case(f"{setting.name} under the launcher, {where} {at}", restarted, setting, where, at)
        )
    return [*cases, case("ddp under the launcher, the other rank hangs", left_alone)]


def restarted(world: World, out: Path, setting: Setting, where: str, at: int) -> None:
    """Checks that the launcher starts all ranks again after one was killed.

    The run then ends by itself, as if nothing had happened.
    """
    done = launch(world, out, setting, where, at, restarts=1)
    check(
        done.returncode == 0,
        f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}",
    )
    check(beside(out, "acted1").exists(), "rank 1 was not killed")
    exact(world.reference(setting), out)


def left_alone(world: World, out: Path) -> None:
    """Checks that the run ends although one rank does not notice that another was killed.

    The one that does not notice hangs, as if it waited for a device.
    """
    done = launch(world, out, DDP, "hang", 7, restarts=0)
    died = beside(out, "acted1").stat().st_mtime
    check(done.returncode not in (0, 2), f"status {done.returncode}")
    check(time.time() - died < 60, f"{time.time() - died:.0f} s")
    check(valid_checkpoints(out) == ["checkpoint-2"], "there is a new checkpoint")
    world.finish(DDP, out)
    exact(world.reference(DDP), out)


def launch(
    world: World, out: Path, setting: Setting, where: str, at: int, restarts: int
) -> subprocess.CompletedProcess:
    script = ROOT / "tests" / "faults" / "rank.py"
    launcher = [
        sys.executable,
        "-m",
        "stanford_alpaca.launch",
        "--nproc_per_node",
        str(setting.ranks),
    ]
    launcher += ["--standalone", "--max_restarts", str(restarts)]
    out.parent.mkdir(parents=True)
    return subprocess.run(
        [*launcher, str(script), where, str(at), *world.argv(setting, out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


ROWS = {
    "five equal runs": equal_runs,
    "kill the group": kill_group,
    "kill in a save": kill_save,
    "kill one rank": kill_one,
}
