"""Prepares what a finished folder has besides its weights, and checks that it can be saved."""

import tempfile
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stanford_alpaca.console import say
from stanford_alpaca.data.templates import set_stops
from stanford_alpaca.errors import UserError, first_line


def drop_invalid(config: GenerationConfig) -> dict[str, Any]:
    """Removes published settings that keep the configuration from being saved again.

    An example is a temperature without ``do_sample``, which has no effect on generation.

    Returns:
        The removed settings by name.
    """
    usual, dropped = GenerationConfig(), {}
    for name, value in sorted(config.to_diff_dict().items()):
        wrong = _wrong_settings(config)
        if wrong == (False, 0):
            break
        setattr(config, name, getattr(usual, name, None))
        if _wrong_settings(config) < wrong:
            dropped[name] = value
        else:
            setattr(config, name, value)
    return dropped


def _wrong_settings(config: GenerationConfig) -> tuple[bool, int]:
    """Returns whether the settings are impossible, and how many lines say what is wrong."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        lines = str(error).splitlines()
        return not lines[0].startswith("GenerationConfig is invalid"), len(lines)
    return False, 0


def check_savable(name: str, *parts: Any) -> None:
    """Raises UserError unless configurations and tokenizer can be saved again.

    Otherwise a run would fail only after it has trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            try:
                part.save_pretrained(folder)
            except Exception as error:  # of any kind: a configuration may hold anything
                raise UserError(
                    f"{name}: its {type(part).__name__} cannot be saved again "
                    f"({first_line(error)}); mend it there first"
                ) from None


def make_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Sets the stop tokens, and drops settings that cannot be saved. A line says what is dropped.

    Raises:
        UserError: something else cannot be saved again.
    """
    set_stops(model.generation_config, tokenizer)
    dropped = drop_invalid(model.generation_config)
    if dropped:
        settings = ", ".join(f"{field} {value}" for field, value in dropped.items())
        say(
            f"{name}: of its generation_config.json is dropped, "
            f"because it changes nothing and cannot be saved: {settings}"
        )
    check_savable(name, model.config, model.generation_config, tokenizer)
