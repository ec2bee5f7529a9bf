"""Continual fine-tuning on running text.

    python -m stanford_alpaca.continual --model_name_or_path M --output_dir O [--recipe script]

The flags and what they do are those of ``stanford_alpaca.train``. Only the defaults differ: they
are the published recipe, as the paper tells it, or with ``--recipe script`` as the authors' script
for LoRA runs it.
"""

import os
import sys
from typing import Any

from stanford_alpaca import train
from stanford_alpaca.console import say
from stanford_alpaca.flags import check_choice, exit_on_user_error
from stanford_alpaca.run.legacy_flags import split_flags

WIKITEXT = "Salesforce/wikitext:wikitext-103-raw-v1"
BLOCKS_PER_STEP = 16
# what the authors' finetune_lora.sh does and the paper does not say. Its LoRA adapts peft's default
# layers of LLaMA. Its costs are those of the head of LLaMA 2 13B (--cost MODEL).
SCRIPT: dict[str, Any] = {
    "max_sentences": 0,
    "lora_target_modules": ["q_proj", "v_proj"],
    "seed": 100,
}
RECIPES: dict[str, dict[str, Any]] = {"paper": {}, "script": SCRIPT}


def chosen_recipe(argv: list[str]) -> tuple[str, list[str]]:
    """Returns the value of --recipe, and the command line without it."""
    flags = split_flags(argv)
    name = next((flag.values for flag in reversed(flags) if flag.name == "recipe"), ["paper"])
    check_choice("recipe", " ".join(name), RECIPES)
    return name[0], [token for flag in flags if flag.name != "recipe" for token in flag.tokens]


def recipe(argv: list[str], world_size: int, name: str = "paper") -> dict[str, Any]:
    """Returns the defaults of flags that are not given, by a recipe of ``RECIPES``."""
    given = {flag.name: flag.values for flag in split_flags(argv)}
    more = RECIPES[name]
    if any(flag.name == "lora" and not flag.is_on for flag in split_flags(argv)):
        more = {key: value for key, value in more.items() if key != "lora_target_modules"}
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
        **more,
    }


def main() -> None:
    """Runs the command."""
    processes = os.environ.get("WORLD_SIZE", "1")
    name, sys.argv[1:] = exit_on_user_error(lambda: chosen_recipe(sys.argv[1:]))
    # ``train`` refuses a WORLD_SIZE that is no number.
    train.main(recipe(sys.argv[1:], int(processes) if processes.isdecimal() else 1, name))


if __name__ == "__main__":
    main()
