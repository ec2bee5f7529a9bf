"""Checks that the disk has room for what a run saves."""

import shutil
from pathlib import Path

from stanford_alpaca.errors import UserError

MIB = 2**20
SAVE_LESS = "give another --output_dir, or save less (--save_only_model, --save_strategy no)"


def checkpoint_bytes(trained: int, optim: str, only_model: bool = False) -> int:
    """Returns the least bytes of a checkpoint: float32 weights and the optimizer state.

    Args:
        trained: how many parameters are saved; with LoRA, those of the adapter.
        optim: --optim, as OptimizerNames writes it. Adam and its kind have two float32 moments. No
            state is assumed for others, or for moments of 8 or 4 bits.
        only_model: --save_only_model.
    """
    moments = (
        8 if "adam" in optim and not optim.endswith(("8bit", "4bit")) and not only_model else 0
    )
    return trained * (4 + moments)


def check_space(
    folder: Path, needed: int, what: str = "a checkpoint", advice: str = SAVE_LESS
) -> None:
    """Raises UserError unless ``needed`` bytes are free where a folder is or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {needed / MIB:,.0f} MiB, and {free / MIB:,.0f} MiB are free; "
            f"make room, {advice}"
        )
