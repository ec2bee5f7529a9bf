"""Continual fine-tuning on running text: ``python -m stanford_alpaca.continual --model_name_or_path M --output_dir O``.

All flags, and all that happens, are those of ``stanford_alpaca.train``; only the defaults are others: the published recipe.
"""

import os
from typing import Any

from stanford_alpaca import train

WIKITEXT = "Salesforce/wikitext:wikitext-103-raw-v1"
BLOCKS_PER_STEP = 16


def recipe(world_size: int) -> dict[str, Any]:
    """What flags are that are not given: the EMO paper's and its published script's."""
    return {
        "data_path": WIKITEXT, "max_sentences": 25_000, "block_size": 256, "mode": "emo2", "num_train_epochs": 1,
        "per_device_train_batch_size": max(1, BLOCKS_PER_STEP // world_size), "learning_rate": 2e-5, "warmup_steps": 0.03,
        "lora": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
        "logging_steps": 10, "save_strategy": "steps", "save_steps": 500, "save_total_limit": 1,
    }  # fmt: skip


if __name__ == "__main__":
    train.main(recipe(int(os.environ.get("WORLD_SIZE", "1"))))
