"""Writes a folder from all ranks so that it appears whole or not at all."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.space import check_space
from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.flags import DISK

# names in the output folder; whatever a killed run leaves under them may be deleted
STAGING, DELETED = ".saving", ".deleting-"


class Staged:
    """Writes a folder beside its target, then moves it there.

    The move waits until all ranks have written and everything is on disk. Every rank calls every
    method, in the same order. ``write`` and ``commit`` return on all ranks or raise on all ranks.

    Collectives: one all_gather_object for each ``write``, four for ``commit`` and ``merge``.
    """

    def __init__(self, target: Path, rank: int, world_size: int, needed: int = 0):
        """Makes the staging folder.

        Raises:
            UserError: on all ranks, unless ``needed`` bytes are free.
        """
        self.target, self.rank, self.world_size = target, rank, world_size
        self.folder = target.parent / STAGING / target.name
        self.write(lambda: self._prepare(needed) if rank == 0 else None)

    def write(self, write: Callable[[], Any]) -> None:
        """Calls ``write`` on every rank.

        Raises:
            UserError: on all ranks, if the file system failed on one.
        """
        write_together(self.target, self.world_size, write)

    def commit(self, about: dict[str, Any]) -> None:
        """Writes the manifest and moves the folder to ``target``. Replaces what is there."""
        files = self._files_on_disk()
        self.write(lambda: self._move(files, about) if self.rank == 0 else None)

    def merge(self) -> dict[str, Any]:
        """Moves the files, one by one, into the parent folder of ``target``.

        The parent folder has no manifest from then on.

        Returns:
            What its manifest will say of the files.
        """
        files = self._files_on_disk()
        self.write(lambda: self._move_files(files) if self.rank == 0 else None)
        return files

    def _files_on_disk(self) -> dict[str, Any]:
        """Returns the manifest's entries for all files, once they are on disk.

        Every rank flushes its share of the files and reads it again.
        """
        shares: list[dict] = []

        def finish_share() -> None:
            names = manifest.list_saved(self.folder)
            shares.append(
                manifest.entries_of(self.folder, names[self.rank :: self.world_size], flush=True)
            )

        self.write(finish_share)
        files = {
            name: entry
            for share in _gather(shares[0], self.world_size)
            for name, entry in share.items()
        }

        def compare() -> None:
            if self.rank == 0 and sorted(files) != manifest.list_saved(self.folder):
                raise OSError(
                    "the machines do not share the output folder: give all of them the same"
                )

        self.write(compare)
        return dict(sorted(files.items()))

    def _move(self, files: dict[str, Any], about: dict[str, Any]) -> None:
        manifest.write(self.folder, files, about)
        remove(self.target)
        self.folder.replace(self.target)
        manifest.flush_folder(self.target.parent)
        self.folder.parent.rmdir()

    def _move_files(self, files: dict[str, Any]) -> None:
        output = self.target.parent
        (output / manifest.MANIFEST_FILE).unlink(missing_ok=True)
        for name in files:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).replace(output / name)
        for folder in {output, *((output / name).parent for name in files)}:
            manifest.flush_folder(folder)
        clear(output)

    def _prepare(self, needed: int) -> None:
        clear(self.target.parent)
        check_space(self.target.parent, needed, self.target.name)
        self.folder.mkdir(parents=True)


def write_together(place: Path, world_size: int, write: Callable[[], Any]) -> None:
    """Calls ``write`` on every rank, and returns on all ranks or raises on all ranks.

    Collectives: one all_gather_object.

    Raises:
        UserError: on all ranks, if the file system failed on one.
    """
    error: BaseException | None = None
    try:
        write()
    except (Exception, CheckpointException) as caught:
        error = caught
    told = (
        None if error is None else (_reason(error), _is_disk(error), isinstance(error, UserError))
    )
    for rank, failure in enumerate(_gather(told, world_size)):
        if failure is not None and failure[2]:
            raise error or UserError(failure[0])
        if failure is not None and (error is None or _is_io(error)):
            where = f" on rank {rank}" if world_size > 1 else ""
            advice = (
                ": make room or mend the disk, and --resume auto goes on from there"
                if failure[1]
                else ""
            )
            raise UserError(
                f"{place}: cannot be saved ({failure[0]}{where}); "
                f"nothing that was saved before has changed{advice}"
            ) from error
    if error is not None:
        raise error


def _gather(mine: Any, world_size: int) -> list[Any]:
    if world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return everyone


def remove(folder: Path) -> None:
    """Deletes a folder. If killed on the way, it leaves nothing that looks like a checkpoint."""
    if folder.exists():
        gone = folder.with_name(DELETED + folder.name)
        shutil.rmtree(gone, ignore_errors=True)
        folder.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def recover(output: Path) -> None:
    """Finishes the move of a checkpoint that was whole when its run was killed.

    The old checkpoint of the same step may already have been deleted.
    """
    for staged in (output / STAGING).glob("checkpoint-*"):
        if (staged / manifest.MANIFEST_FILE).is_file() and not (output / staged.name).exists():
            staged.replace(output / staged.name)


def clear(output: Path) -> None:
    """Removes what a killed run has left half written or half deleted."""
    for left in [output / STAGING, *output.glob(f"{DELETED}*")]:
        shutil.rmtree(left, ignore_errors=True)


def keep_newest(saved: Path, limit: int | None, best: str | None) -> None:
    """Deletes the checkpoints that exceed ``--save_total_limit``, counting the one just saved.

    If one cannot be deleted, a line says so.
    """
    try:
        for folder in _surplus(saved, limit, best):
            remove(folder)
    except OSError as error:
        say(f"{saved.parent}: an old checkpoint cannot be deleted ({first_line(error)})")


def _surplus(saved: Path, limit: int | None, best: str | None) -> list[Path]:
    """Returns the older checkpoints to delete: all except the newest good ones and the best.

    A checkpoint is good if its files have the sizes in its manifest. The one just saved has already
    been read again. Newer checkpoints, which the run passed over, are left alone.
    """
    if limit is None or limit <= 0:
        return []
    older = [
        folder
        for folder in manifest.checkpoints(saved.parent)
        if manifest.step_of(folder) < manifest.step_of(saved)
    ]
    good = [folder for folder in older if not manifest.problems(folder, contents=False)]
    apart = Path(best) if best is not None and Path(best) in good else None
    places = limit - 1 - (apart is not None and limit > 1)  # beside the saved one and the best
    kept = [*[folder for folder in good if folder != apart][: max(0, places)], apart]
    return [folder for folder in older if folder not in kept]


def _is_io(error: BaseException) -> bool:
    """Returns whether the file system failed, also by the messages of libraries that write for us.

    A missing file does not count: that is our mistake.
    """
    if isinstance(error, CheckpointException):
        return all(_is_io(each) for each, _ in error.failures.values())
    told = (
        "os error",
        "inline_container",
        "file write failed",
        "No space left",
        "Input/output error",
    )
    mine = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return mine or any(words in str(error) for words in told)


def _is_disk(error: BaseException) -> bool:
    """Returns whether the file system failed because the disk is full or broken."""
    if isinstance(error, CheckpointException):
        return all(_is_disk(each) for each, _ in error.failures.values())
    number = re.search(r"os error (\d+)", str(error))  # in a message of safetensors
    if isinstance(error, OSError) or number:
        return (int(number[1]) if number else getattr(error, "errno", None)) in DISK
    return _is_io(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return first_line(next(iter(error.failures.values()))[0])
    if "inline_container" in str(error):
        return "torch.save could not write: the disk is full or broken"
    return first_line(error)
