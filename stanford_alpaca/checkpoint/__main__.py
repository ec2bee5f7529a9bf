"""Looks after checkpoints: ``python -m stanford_alpaca.checkpoint export DIR OUT``."""

import sys
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFns
from transformers.utils import logging

from stanford_alpaca.checkpoint.export import export
from stanford_alpaca.errors import UserError, check_writable, exit_on_user_error, refuse_unknown


@SetParseFns(str, str)
def export_checkpoint(checkpoint: str | None = None, out: str | None = None, *more: Any, **unknown: Any) -> None:
    """A plain Hugging Face folder from a checkpoint of any engine: python -m stanford_alpaca.checkpoint export DIR OUT

    Needs a CPU and memory for the model's float32 weights.

    Args:
        checkpoint: a folder checkpoint-N of a run.
        out: where to write the model and its tokenizer: a folder that is new or empty.
    """
    refuse_unknown(unknown, export_checkpoint)
    if checkpoint is None or out is None or more:
        raise UserError("give a checkpoint and a folder to write: python -m stanford_alpaca.checkpoint export DIR OUT")
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser().absolute()
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; give another")
    check_writable("out", target)
    logging.disable_progress_bar()
    print(export(source, target))


COMMANDS = {"export": export_checkpoint}


def main() -> None:
    """The command."""
    exit_on_user_error(_run)


def _run() -> None:
    if not sys.argv[1:] or sys.argv[1] not in (*COMMANDS, "--help"):
        raise UserError(f"give a command ({', '.join(COMMANDS)}): python -m stanford_alpaca.checkpoint export --help")
    fire.Fire(COMMANDS)


if __name__ == "__main__":
    main()
