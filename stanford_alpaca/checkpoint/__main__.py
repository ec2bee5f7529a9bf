"""The command that verifies, lists and exports checkpoints."""

import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import fire
from transformers.utils import logging

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.export import export
from stanford_alpaca.console import show
from stanford_alpaca.errors import ResumeError, UserError
from stanford_alpaca.flags import check_writable, command, exit_on_user_error, words


@dataclass(frozen=True)
class Options:
    """Verifies, lists and exports checkpoints.

    python -m stanford_alpaca.checkpoint verify DIR
    python -m stanford_alpaca.checkpoint list DIR
    python -m stanford_alpaca.checkpoint export CHECKPOINT OUT

    verify reads every file; the exit status is 3 if a checkpoint is damaged. list reads no
    contents. Each takes a folder checkpoint-N, or the output folder of a run. export writes a
    checkpoint of any engine as a plain Hugging Face folder. It needs no GPU, but memory for the
    model's float32 weights.

    Args:
        paths: the folder. For export, a checkpoint-N and a new or empty folder to write to.
    """

    paths: tuple[str, ...] = words()


def export_checkpoint(options: Options) -> None:
    """Writes a checkpoint as a plain folder, and prints where."""
    if len(options.paths) != 2:
        raise UserError(
            "give a checkpoint and a folder to write: "
            "python -m stanford_alpaca.checkpoint export DIR OUT"
        )
    checkpoint, out = options.paths
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser().absolute()
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; give another")
    check_writable("out", target)
    logging.disable_progress_bar()
    show(export(source, target))


def verify(options: Options) -> None:
    """Prints what is wrong with each checkpoint. Raises ResumeError if one is damaged."""
    places = _places(options.paths)
    broken = 0
    for place in places:
        found = manifest.problems(place)
        broken += bool(found)
        show(f"{place}: good" if not found else f"{place}: " + "; ".join(found))
    if broken:
        raise ResumeError(f"{broken} of {len(places)} damaged")


def list_checkpoints(options: Options) -> None:
    """Prints a line for each checkpoint."""
    places = _places(options.paths)
    show(f"{'step':>8} {'processes':>9} {'MiB':>10}  {'saved':16}  folder")
    for place in places:
        found = manifest.summary(place, contents=False)
        if found:
            show(f"{'':>8} {'':>9} {'':>10}  {'':16}  {place}: {found}")
            continue
        about, mib = manifest.read(place), manifest.size(place) / 2**20
        saved = datetime.fromtimestamp((place / manifest.MANIFEST_FILE).stat().st_mtime).strftime(
            "%Y-%m-%d %H:%M"
        )
        show(
            f"{about['step']:>8} {about.get('world_size', ''):>9} {mib:>10,.1f}  "
            f"{saved:16}  {place}"
        )


def _places(paths: tuple[str, ...]) -> list[Path]:
    """Returns the folders that should have a manifest, the oldest first.

    These are each checkpoint-N inside the one folder given, then that folder itself if it has a
    manifest or is named checkpoint-N.

    Raises:
        UserError: not exactly one folder is given, or there is no checkpoint in it.
    """
    if len(paths) != 1:
        raise UserError("give one folder: a checkpoint-N, or the output folder of a run")
    place = Path(paths[0]).expanduser()
    if not place.is_dir():
        raise UserError(f"{place}: no such folder")
    below = manifest.checkpoints(place)[::-1]
    own = (
        [place]
        if (place / manifest.MANIFEST_FILE).exists()
        or re.fullmatch(r"checkpoint-\d+", place.absolute().name)
        else []
    )
    if not below and not own:
        raise UserError(f"{place}: no checkpoint-N in it, and no {manifest.MANIFEST_FILE}")
    return [*below, *own]


ACTIONS = {
    "verify": command(Options, verify),
    "list": command(Options, list_checkpoints),
    "export": command(Options, export_checkpoint),
}


def main() -> None:
    """Runs the command."""
    exit_on_user_error(_run)


def _run() -> None:
    if sys.argv[1:2] == ["--help"]:
        sys.argv[1:] = ["list", "--help"]  # one help for all
    if not sys.argv[1:] or sys.argv[1] not in ACTIONS:
        raise UserError(
            f"give a command ({', '.join(ACTIONS)}): python -m stanford_alpaca.checkpoint --help"
        )
    fire.Fire(ACTIONS)


if __name__ == "__main__":
    main()
