"""Faults inside a rank, and the points where they happen. The package has no switches for them."""

import errno
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

POINTS = ("load", "fetch", "step", "save", "evaluation", "disk")
FAILS = ("EIO", "ENOSPC", "EROFS")  # these last from the given point on
REMOVES = ("os.remove", "os.rmdir")


@dataclass(frozen=True)
class Fault:
    """Something that happens to some ranks when they come to a point for the ``at``-th time.

    Args:
        do: what happens. ``kill`` and ``term`` send a signal, and a name of ``errno`` raises that
            error. ``wait`` waits until there is a file ``go`` beside the output folder. ``count``
            only lists what the rank does on the disk, in a file beside the output folder.
        where: the point. ``load`` is before the data is loaded, ``fetch`` before a batch is
            collated, ``step`` before a micro-batch, ``save`` before a checkpoint, and
            ``evaluation`` before a batch of an evaluation. ``disk`` is before a file in the output
            folder is opened for writing, written, flushed by fsync, renamed or removed.
        at: how often the rank has come to the point before; the first time is 0.
        ranks: the ranks it happens to; None means all.
        once: it does not happen again in a run that is started again.
    """

    do: str
    where: str
    at: int
    ranks: tuple[int, ...] | None = None
    once: bool = False


class Hooks:
    """Puts the points into one rank's process, and acts where the fault says so."""

    def __init__(self, fault: Fault | None, out: Path):
        self.out, self.fault = out, fault
        self.rank = int(os.environ.get("RANK", "0"))
        self.counts = {point: itertools.count() for point in POINTS}
        counting = fault is not None and fault.do == "count"
        place = beside(out, f"disk{self.rank}")
        self.log = open(place, "w") if counting else None  # noqa: SIM115
        self.acted = self.mending = False

    def come(
        self, point: str, what: str = "", broken: Callable[[], Exception] | None = None
    ) -> None:
        """Counts a visit of a point, and lets the fault happen if it belongs there.

        ``broken`` makes the error that a failing disk causes at this point.
        """
        fault, count = self.fault, next(self.counts[point])
        if self.log is not None and point == "disk":
            self.log.write(what + "\n")
            self.log.flush()
        if (
            fault is None
            or point != fault.where
            or (fault.ranks is not None and self.rank not in fault.ranks)
        ):
            return
        if fault.do in FAILS:
            if count >= fault.at:
                number = getattr(errno, fault.do)
                raise broken() if broken is not None else OSError(number, os.strerror(number), what)
        elif count == fault.at and not self.acted:
            self.act(fault)

    def act(self, fault: Fault) -> None:
        mark = beside(self.out, f"acted{self.rank}")
        if fault.once and mark.exists():
            return
        self.acted = True
        mark.touch()
        if fault.do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.do == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        while fault.do == "wait" and not beside(self.out, "go").exists():
            time.sleep(0.01)

    def install(self) -> None:
        """Puts the points into the run, and records the rows that each step sees.

        Points on the disk are added only if the fault is there.
        """
        from stanford_alpaca import train
        from stanford_alpaca.data.batching import PadCollator
        from stanford_alpaca.training.trainer import EmoTrainer

        before(train, "load_data", lambda *_: self.come("load"))
        before(PadCollator, "__call__", lambda *_: self.come("fetch"))
        before(EmoTrainer, "training_step", lambda *_: self.come("step"))
        before(EmoTrainer, "_save_checkpoint", lambda *_: self.come("save"))
        before(EmoTrainer, "prediction_step", lambda *_: self.come("evaluation"))
        fetch, rows = EmoTrainer.get_batch_samples, beside(self.out, f"seen{self.rank}").open("a")

        def recorded(trainer, *args: Any, **kwargs: Any):
            samples, items = fetch(trainer, *args, **kwargs)
            found = [row_id(row) for sample in samples for row in rows_of(sample)]
            rows.write(json.dumps([trainer.state.global_step + 1, found]) + "\n")
            rows.flush()
            return samples, items

        EmoTrainer.get_batch_samples = recorded
        if self.fault is not None and self.fault.where == "disk":
            self.watch_disk()

    def watch_disk(self) -> None:
        """Puts points at Python's audit events, at fsync, and into two functions that write files.

        These are the functions with which torch and safetensors write.
        """
        import safetensors.torch
        import torch
        from safetensors import SafetensorError

        def audit(event: str, args: tuple) -> None:
            writing = (
                event == "open"
                and isinstance(args[2], int)
                and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writing or event == "os.rename":
                self.change(event, args[0])
            elif event in REMOVES:  # rmtree removes by directory descriptor
                parent = f"/proc/self/fd/{args[1]}"
                self.change(
                    event,
                    f"{os.readlink(parent)}/{args[0]}"
                    if args[1] >= 0 and os.path.exists(parent)
                    else args[0],
                )

        sys.addaudithook(audit)
        before(
            os,
            "fsync",
            lambda descriptor: self.change("fsync", os.readlink(f"/proc/self/fd/{descriptor}")),
        )
        full = "No space left on device (os error 28)"
        for module, name, place, error in (
            (
                torch,
                "save",
                1,
                lambda: RuntimeError(
                    "[enforce fail at inline_container.cc:664] . file write failed"
                ),
            ),
            (
                safetensors.torch,
                "serialize_file",
                1,
                lambda: SafetensorError(f"Error while serializing: I/O error: {full}"),
            ),
        ):
            self.write_in_two(module, name, place, error)

    def change(self, what: str, path: Any, broken: Callable[[], Exception] | None = None) -> None:
        """Visits the point ``disk`` if the path is in the output folder."""
        folder = f"{self.out.absolute()}/"
        if (
            f"{os.path.abspath(path) if isinstance(path, str | os.PathLike) else path}/".startswith(
                folder
            )
            and not self.mending
        ):
            self.come("disk", f"{what} {str(path).removeprefix(folder)}", broken)

    def write_in_two(
        self, module: Any, name: str, place: int, error: Callable[[], Exception]
    ) -> None:
        """Puts two points into a function that writes a whole file by itself.

        One is before the write, and one is where half of the file is there.
        """
        write = getattr(module, name)

        def halved(*args: Any, **kwargs: Any) -> None:
            file = args[place] if len(args) > place else None
            if not isinstance(file, str | os.PathLike):
                return write(*args, **kwargs)
            self.change(name, file, error)
            write(*args, **kwargs)
            content = Path(file).read_bytes()
            self.mending = True
            os.truncate(file, len(content) // 2)
            self.mending = False
            self.change("half of", file, error)
            self.mending = True
            Path(file).write_bytes(content)
            self.mending = False

        setattr(module, name, halved)


def before(owner: Any, name: str, call: Callable[..., None]) -> None:
    """Replaces a function or method by one that first calls ``call`` with the same arguments."""
    function = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        call(*args)
        return function(*args, **kwargs)

    setattr(owner, name, both)


def beside(out: Path, name: str) -> Path:
    """Returns the path of a harness file about a run, beside the run's output folder."""
    return out.with_name(f"{out.name}.{name}")


def rows_of(batch: dict) -> list[list[int]]:
    """Returns the rows of a padded batch, without padding."""
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def row_id(ids: list[int]) -> str:
    return sha256(str(ids).encode()).hexdigest()[:12]
