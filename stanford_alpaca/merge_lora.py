"""Merges an adapter into the model it was trained on: ``python -m stanford_alpaca.merge_lora ADAPTER_OR_RUN OUTPUT``.

The result is a plain Hugging Face folder. Weights are added in float32, and the logits are compared before and after.
"""

from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFns
from transformers.utils import logging

from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_writable, exit_on_user_error, refuse_unknown
from stanford_alpaca.models.adapters import find_adapter, find_base
from stanford_alpaca.models.merge import DTYPES, merge


@SetParseFns(str, str, base=str, dtype=str, cache_dir=str)
def run(
    adapter: str | None = None,
    output: str | None = None,
    *more: Any,
    base: str | None = None,
    dtype: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    **unknown: Any,
) -> None:
    """Merges an adapter into its base: python -m stanford_alpaca.merge_lora ADAPTER_OR_RUN OUTPUT

    Args:
        adapter: the folder or hub name of an adapter, the output folder of a run with --lora, or a checkpoint-N of one.
        output: where to write the model: a folder that is new or empty.
        base: where the model is that the adapter was trained on, if not where the adapter says.
        dtype: float32, bfloat16 or float16: of what is written; by default the base's.
        cache_dir: where the hub's files are kept.
        trust_remote_code: runs the code that the base's folder or repository brings along.
    """
    refuse_unknown(unknown, run)
    if adapter is None or output is None or more:
        raise UserError("give an adapter and a folder to write: ADAPTER_OR_RUN OUTPUT")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    target = Path(output).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; give another")
    check_writable("output", target)
    logging.disable_progress_bar()
    found = find_adapter(adapter, cache_dir)
    found_base = find_base(found, base, cache_dir, remote_code=trust_remote_code)
    print(merge(found, found_base, target, dtype, cache_dir, remote_code=trust_remote_code))


def main() -> None:
    """The command."""
    logging.set_verbosity_error()
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
