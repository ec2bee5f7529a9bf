"""Disks that are full, fail, or cannot be written to, and files that were damaged since they were saved."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.faults.harness import (
    DDP,
    FSDP,
    FSDP_LORA,
    LORA,
    PLAIN,
    ZERO2,
    Case,
    Fault,
    Lost,
    Setting,
    World,
    case,
    check,
    exact,
)
from tests.faults.kills import disk_event, valid_checkpoints

FULL, DAMAGED = 2, 3  # exit statuses


def refused_disk(ended, out: Path) -> None:
    """All ranks ended in one line and the status of a user's mistake, and what was saved before is good."""
    check(set(ended.statuses) == {FULL}, f"statuses {ended.statuses}\n{ended.text[-3000:]}")
    check("Traceback" not in ended.text and ended.errors(), f"no clear line\n{ended.text[-2000:]}")
    check(len(set(ended.errors())) == 1, f"several lines: {ended.errors()}")
    valid_checkpoints(out)


def failing_disk(rng: Random) -> list[Case]:
    def fails(world: World, out: Path, setting: Setting, error: str, rank: int, share: float) -> None:
        at, what = disk_event(world, setting, rank, share)
        ended = world.run(setting, out, Fault(error, "disk", at, (rank,)))
        try:
            refused_disk(ended, out)
        except Lost as lost:
            raise Lost(f"{what}: {lost}") from None
        check(valid_checkpoints(out), f"{what}: no checkpoint is left")
        world.finish(setting, out)
        exact(world.reference(setting), out)

    cases = []
    for number, (setting, rank) in enumerate([(PLAIN, 0), (PLAIN, 0), (LORA, 0), (DDP, 0), (DDP, 1), (FSDP, 0), (FSDP, 1)] * 2):
        error, share = ("ENOSPC", "EIO")[number % 2], round(rng.random(), 3)
        cases.append(case(f"{error} on rank {rank} of {setting.name}, {share} through", fails, setting, error, rank, share))
    for setting, kib in [(PLAIN, 1300), (LORA, 700), (DDP, 2200), (FSDP, 1500)]:
        cases.append(case(f"{setting.name} on a disk of {kib} KiB", on_mount, setting, f"size={kib}k", "size=100m"))
    for setting in (PLAIN, FSDP):
        cases.append(case(f"{setting.name} on a disk that turns read-only", on_mount, setting, "size=100m", "rw", "ro"))
    return cases


def on_mount(world: World, out: Path, setting: Setting, options: str, mended: str, turns: str | None = None) -> None:
    """The output folder on a disk of its own: too small, or not to be written to from the second step on; then mended."""
    mount = out.with_name("disk")
    mount.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", str(mount)], capture_output=True).returncode:
        return  # not allowed here
    place = mount / "out"
    try:
        fault = Fault("wait", "fetch", 6) if turns else None

        def turn() -> None:
            wait_until(lambda: (place / "checkpoint-2").exists() and list(mount.glob("out.acted*")))
            (mount / "out.go").touch()
            remount(mount, turns or "")

        ended = world.run(setting, place, fault, meanwhile=turn if turns else None)
        refused_disk(ended, place)
        remount(mount, mended)
        world.finish(setting, place)
        exact(world.reference(setting), place)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
