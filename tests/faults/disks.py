"""Disks that are full, failing or read-only, and files that were damaged after they were saved."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from stanford_alpaca.checkpoint import manifest
from tests.faults.harness import (
    DDP,
    FSDP,
    FSDP_LORA,
    LORA,
    PLAIN,
    ZERO2,
    Case,
    Lost,
    NotHere,
    Setting,
    case,
    check,
    exact,
    valid_checkpoints,
)
from tests.faults.hooks import Fault, Hooks
from tests.faults.kills import disk_event
from tests.faults.world import World

FULL, DAMAGED = 2, 3  # exit statuses of rank 0; other ranks end with one of the two


def refused_disk(ended, out: Path) -> None:
    """Checks that all ranks failed with one error line, rank 0 with the status of a user error.

    What was saved before must be good.
    """
    check(
        ended.statuses[0] == FULL and all(ended.statuses),
        f"statuses {ended.statuses}\n{ended.text[-3000:]}",
    )
    check("Traceback" not in ended.text and ended.errors(), f"no clear line\n{ended.text[-2000:]}")
    check(len(set(ended.errors())) == 1, f"several lines: {ended.errors()}")
    valid_checkpoints(out)


def failing_disk(rng: Random) -> list[Case]:
    """Makes the disk fail from a change in a save on, or makes it too small or read-only."""

    def fails(
        world: World, out: Path, setting: Setting, error: str, rank: int, share: float
    ) -> None:
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
    for number, (setting, rank) in enumerate(
        [(PLAIN, 0), (LORA, 0), (DDP, 0), (DDP, 1), (FSDP, 0), (FSDP, 1), (PLAIN, 0)] * 2
    ):
        error, share = ("ENOSPC", "EIO", "EROFS")[number % 3], round(rng.random(), 3)
        cases.append(
            case(
                f"{error} on rank {rank} of {setting.name}, {share} through",
                fails,
                setting,
                error,
                rank,
                share,
            )
        )
    for setting, looks in ((PLAIN, True), (PLAIN, False), (LORA, False), (FSDP, False)):
        what = (
            f"{setting.name}, room for a checkpoint and a half"
            f"{'' if looks else ', which nobody foresees'}"
        )
        cases.append(case(what, too_small, setting, looks))
    return cases + [
        case(f"{setting.name}, a disk that has become read-only", read_only, setting)
        for setting in (PLAIN, FSDP)
    ]


def overlook(hooks: Hooks) -> None:
    """Makes the disk seem empty in the child process, so that only a write finds it full."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=2**60)


def too_small(world: World, out: Path, setting: Setting, looks: bool) -> None:
    size = manifest.size(manifest.checkpoints(world.reference(setting))[0])
    with mounted(out, f"size={int(1.5 * size) + 2**16}") as remount:
        refused_disk(world.run(setting, out, more=None if looks else overlook), out)
        check(looks or valid_checkpoints(out), "no checkpoint was written")
        remount("size=100m")
        world.finish(setting, out)
        exact(world.reference(setting), out)


def read_only(world: World, out: Path, setting: Setting) -> None:
    with mounted(out, "size=100m") as remount:
        world.run(setting, out, Fault("kill", "step", 7), together=True)
        remount("ro")
        refused_disk(world.run(setting, out), out)
        remount("rw")
        world.finish(setting, out)
        exact(world.reference(setting), out)


@contextlib.contextmanager
def mounted(out: Path, options: str) -> Iterator[Callable[[str], None]]:
    """Mounts the output folder as a disk of its own.

    Yields a function that mounts it again with other options.
    """

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(out)], capture_output=True, text=True)
        if done.returncode:
            raise NotHere(f"mount: {done.stderr.strip()}")

    out.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", options, "faults")
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


# ---- damaged files -------------------------------------------------------------------------------


def deleted(file: Path, rng: Random, other: Path) -> None:
    file.unlink()


def truncated(file: Path, rng: Random, other: Path) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(max(1, file.stat().st_size))])


def emptied(file: Path, rng: Random, other: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path, rng: Random, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def zeroed(file: Path, rng: Random, other: Path) -> None:
    """Zeroes the end of a file, as a file system leaves what it did not write.

    At least one byte changes.
    """
    content = file.read_bytes()
    start = min(rng.randrange(len(content)), len(content.rstrip(b"\0")) - 1)
    file.write_bytes(content[:start] + bytes(len(content) - start))


def swapped(file: Path, rng: Random, other: Path) -> None:
    """Replaces a file by the file of the same name in the other checkpoint.

    If the two are equal, another file of the same checkpoint is taken.
    """
    found = [other / file.name, *sorted(path for path in file.parent.iterdir() if path.is_file())]
    file.write_bytes(
        next(
            path.read_bytes()
            for path in found
            if path.exists() and path.read_bytes() != file.read_bytes()
        )
    )


HARMS = (deleted, truncated, emptied, flipped, zeroed, swapped)
ENGINES = (PLAIN, LORA, DDP, FSDP, FSDP_LORA, ZERO2)


def damaged(
    world: World, out: Path, setting: Setting, share: float, harm: Callable, seed: int, alone: bool
) -> None:
    """Damages a file of the newest checkpoint, and checks what the next run does.

    ``share`` chooses the file by its place in the list of files. The run has an older checkpoint to
    fall back to, unless ``alone``.
    """
    usual = world.reference(setting, save_total_limit=None)
    world.copy(usual, out, only=[4] if alone else [2, 4])
    newest, older = out / "checkpoint-4", usual / "checkpoint-2"
    files = [*manifest.list_saved(newest), manifest.MANIFEST_FILE]
    name = files[int(share * len(files))]
    content = (newest / name).read_bytes()
    (newest / name).unlink()  # a hard link
    (newest / name).write_bytes(content)
    harm(newest / name, Random(seed), older / Path(name).parent)
    if alone:
        before = manifest.list_saved(out)
        ended = world.run(setting, out, save_total_limit=None)
        check(
            ended.statuses[0] == DAMAGED and set(ended.statuses) <= {FULL, DAMAGED},
            f"{name}: statuses {ended.statuses}\n{ended.text[-2000:]}",
        )
        check(
            any(name in line for line in ended.errors()), f"{name} is not named: {ended.errors()}"
        )
        check(manifest.list_saved(out) == before, f"{name}: the output folder has changed")
        return
    ended = world.finish(setting, out, save_total_limit=None)
    # With the other checkpoint's manifest, it is the other files that seem to be damaged.
    named = "" if name == manifest.MANIFEST_FILE and harm is swapped else name
    lines = [
        line
        for line in ended.text.splitlines()
        if "passed over checkpoint-4" in line and named in line
    ]
    check(lines, f"{name} of checkpoint-4 is not named\n{ended.text[-2000:]}")
    exact(usual, out)


def damage(rng: Random) -> list[Case]:
    cases = []
    for number in range(60):
        setting, harm, alone = (
            ENGINES[number % 6],
            HARMS[(number // 6 + number) % 6],
            number % 7 == 6,
        )
        share, seed = round((number // 6 + rng.random()) / 10, 3), rng.randrange(2**32)
        what = (
            f"{setting.name}, the file {share} through the list {harm.__name__}"
            f"{', the only checkpoint' if alone else ''}"
        )
        cases.append(case(what, damaged, setting, share, harm, seed, alone))
    return cases


ROWS = {"full and failing disks": failing_disk, "damaged files": damage}
