"""Merges an adapter into the model it was trained on.

Usage: ``python -m stanford_alpaca.merge_lora ADAPTER_OR_RUN OUTPUT``.

The result is a plain Hugging Face folder. Weights are added in float32, and the logits are compared
before and after.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from stanford_alpaca.console import show
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import (
    check_choice,
    check_writable,
    command,
    exit_on_user_error,
    from_command_line,
    word,
    words,
)
from stanford_alpaca.models.adapters import find_adapter, find_base
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.models.merge import DTYPES, merge


@dataclass(frozen=True)
class Options:
    """Merges an adapter into its base, the model it was trained on.

    Usage: python -m stanford_alpaca.merge_lora ADAPTER_OR_RUN OUTPUT

    Args:
        adapter: the folder or hub name of an adapter, the output folder of a run with --lora, or a
            checkpoint-N of such a run.
        output: where to write the model: a new or empty folder.
        base: where the base is, if not where the adapter says.
        dtype: what the weights are written in: float32, bfloat16 or float16; by default the base's.
        cache_dir: where the hub's files are kept.
        trust_remote_code: runs the code that the base's folder or repository brings along.
    """

    adapter: str | None = word()
    output: str | None = word()
    more: tuple[str, ...] = words()
    base: str | None = None
    dtype: str | None = None
    cache_dir: str | None = None
    trust_remote_code: bool = False


def merge_adapter(options: Options) -> None:
    """Checks the flags, finds the adapter and its base, and writes the merged model."""
    if options.adapter is None or options.output is None or options.more:
        raise UserError("give an adapter and a folder to write: ADAPTER_OR_RUN OUTPUT")
    check_choice("dtype", options.dtype, DTYPES)
    target = Path(options.output).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; give another")
    check_writable("output", target)
    logging.disable_progress_bar()
    found = find_adapter(options.adapter, options.cache_dir)
    source = ModelSource(found.name, options.cache_dir, options.trust_remote_code)
    show(merge(found, find_base(found, options.base, source), target, options.dtype))


run = command(Options, merge_adapter)


def main() -> None:
    """Runs the command."""
    logging.set_verbosity_error()
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
