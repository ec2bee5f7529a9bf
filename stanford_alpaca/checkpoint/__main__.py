"""Verifies, lists and exports checkpoints.

Usage: ``python -m stanford_alpaca.checkpoint verify|list DIR``, ``... export DIR OUT``.
"""

import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFns
from transformers.utils import logging

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.export import export
from stanford_alpaca.errors import ResumeError, UserError
from stanford_alpaca.flags import check_writable, exit_on_user_error, refuse_unknown


@SetParseFns(str, str)
def export_checkpoint(
    checkpoint: str | None = None, out: str | None = None, *more: Any, **unknown: Any
) -> None:
    """Exports a checkpoint of any engine as a plain Hugging Face folder.

    Usage: python -m stanford_alpaca.checkpoint export DIR OUT

    It needs no GPU, but memory for the model's float32 weights.

    Args:
        checkpoint: a folder checkpoint-N of a run.
        out: where to write the model and its tokenizer: a new or empty folder.
    """
    refuse_unknown(unknown, export_checkpoint)
    if checkpoint is None or out is None or more:
        raise UserError(
            "give a checkpoint and a folder to write: "
            "python -m stanford_alpaca.checkpoint export DIR OUT"
        )
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser().absolute()
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; give another")
    check_writable("out", target)
    logging.disable_progress_bar()
    print(export(source, target))


@SetParseFns(str)
def verify(folder: str | None = None, *more: Any, **unknown: Any) -> None:
    """Reads every file of one checkpoint, or of all checkpoints in a run's output folder.

    Usage: python -m stanford_alpaca.checkpoint verify DIR

    The exit status is 3 if a checkpoint is damaged.

    Args:
        folder: a folder checkpoint-N, or the output folder of a run.
    """
    refuse_unknown(unknown, verify)
    places = _places(folder, more)
    broken = 0
    for place in places:
        found = manifest.problems(place)
        broken += bool(found)
        print(f"{place}: good" if not found else f"{place}: " + "; ".join(found))
    if broken:
        raise ResumeError(f"{broken} of {len(places)} damaged")


@SetParseFns(str)
def list_checkpoints(folder: str | None = None, *more: Any, **unknown: Any) -> None:
    """Lists the checkpoints of a run without reading their contents.

    Usage: python -m stanford_alpaca.checkpoint list DIR

    Args:
        folder: the output folder of a run, or a folder checkpoint-N.
    """
    refuse_unknown(unknown, list_checkpoints)
    print(f"{'step':>8} {'processes':>9} {'MiB':>10}  {'saved':16}  folder")
    for place in _places(folder, more):
        found = manifest.summary(place, contents=False)
        if found:
            print(f"{'':>8} {'':>9} {'':>10}  {'':16}  {place}: {found}")
            continue
        about, mib = manifest.read(place), manifest.size(place) / 2**20
        saved = datetime.fromtimestamp((place / manifest.MANIFEST_FILE).stat().st_mtime).strftime(
            "%Y-%m-%d %H:%M"
        )
        print(
            f"{about['step']:>8} {about.get('world_size', ''):>9} {mib:>10,.1f}  "
            f"{saved:16}  {place}"
        )


def _places(folder: str | None, more: tuple) -> list[Path]:
    """Returns the folders that should have a manifest, the oldest first.

    These are each checkpoint-N inside ``folder``, then ``folder`` itself if it has a manifest or is
    named checkpoint-N.

    Raises:
        UserError: not exactly one folder is given, or there is no checkpoint in it.
    """
    if folder is None or more:
        raise UserError("give one folder: a checkpoint-N, or the output folder of a run")
    place = Path(folder).expanduser()
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


COMMANDS = {"verify": verify, "list": list_checkpoints, "export": export_checkpoint}


def main() -> None:
    """Runs the command."""
    exit_on_user_error(_run)


def _run() -> None:
    if not sys.argv[1:] or sys.argv[1] not in (*COMMANDS, "--help"):
        raise UserError(
            f"give a command ({', '.join(COMMANDS)}): "
            "python -m stanford_alpaca.checkpoint export --help"
        )
    fire.Fire(COMMANDS)


if __name__ == "__main__":
    main()
