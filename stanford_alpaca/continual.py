"""Continual fine-tuning on running text.

    python -m stanford_alpaca.continual --model_name_or_path M --output_dir O

The flags and what they do are those of ``stanford_alpaca.train``. Only the defaults differ: they
are the published recipe.
"""

import os
import sys
from typing import Any

from stanford_alpaca import train
from stanford_alpaca.console import say
from stanford_alpaca.run.legacy_flags import split_flags

WIKITEXT = "Salesforce/wikitext:wikitext-103-raw-v1"
BLOCKS_PER_STEP = 16


def recipe(argv: list[str], world_size: int) -> dict[str, Any]:
    """Returns the defaults of flags that are not given: those of the EMO paper and its script."""
    given = {flag.name: flag.values for flag in split_flags(argv)}
    sizes: dict[str, int] = {"per_device_train_batch_size": max(1, BLOCKS_PER_STEP // world_size)}
    asked = "".join(given.get("per_device_train_batch_size", []))
    if "gradient_accumulation_steps" not in given and not (asked and not asked.isdecimal()):
        at_once = max(1, int(asked or sizes["per_device_train_batch_size"]) * world_size)
        sizes["global_batch"] = max(at_once, BLOCKS_PER_STEP // at_once * at_once)
        if "global_batch" not in given and sizes["global_batch"] != BLOCKS_PER_STEP:
            say(
                f"global batch {sizes['global_batch']}: "
                f"{BLOCKS_PER_STEP} cannot be had from {at_once} at a time"
            )
    return sizes | {
        "data_path": WIKITEXT,
        "max_sentences": 25_000,
        "block_size": 256,
        "mode": "emo2",
        "num_train_epochs": 1,
        "learning_rate": 2e-5,
        "warmup_steps": 0.03,
        "lora": True,
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 1,
    }


def main() -> None:
    """Runs the command."""
    processes = os.environ.get("WORLD_SIZE", "1")
    # ``train`` refuses a WORLD_SIZE that is no number.
    train.main(recipe(sys.argv[1:], int(processes) if processes.isdecimal() else 1))


if __name__ == "__main__":
    main()
