"""What ``--help`` of training prints: our flags by group, and with ``--help-all`` the Trainer's."""

import dataclasses
import shutil
import textwrap
from typing import Any

import transformers

from stanford_alpaca.run.arguments import FLAGS, TrainingArguments
from stanford_alpaca.run.trainer_flags import HONOURED

TITLES = {
    "ModelArguments": "The model",
    "DataArguments": "The data",
    "ObjectiveArguments": "The objective",
    "LoraArguments": "LoRA",
    "TrainingArguments": "The run",
}
USAGE = """\
Supervised fine-tuning with EMO.

  emo train --model_name_or_path MODEL --data_path FILE --output_dir FOLDER [--FLAG VALUE ...]
  emo train --config run.yaml [--FLAG VALUE ...]
"""
THEIRS = """\
Flags of Hugging Face's TrainingArguments hold too, such as --learning_rate, --num_train_epochs,
--per_device_train_batch_size, --output_dir, --save_steps and --bf16. --help-all lists them.
"""


def own_fields(cls: type) -> list[dataclasses.Field]:
    """Returns the flags that this package declares, without those that transformers has."""
    if cls is not TrainingArguments:
        return list(dataclasses.fields(cls))
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return [field for field in dataclasses.fields(cls) if field.name not in theirs]


def their_fields() -> list[dataclasses.Field]:
    """Returns the Trainer's flags that are honoured, in transformers' order."""
    theirs = dataclasses.fields(transformers.TrainingArguments)
    return [field for field in theirs if field.name in HONOURED]


def default_of(field: dataclasses.Field) -> str:
    """Returns a default as one would type it; nothing if there is none."""
    value: Any = field.default_factory() if callable(field.default_factory) else field.default
    if value is dataclasses.MISSING:
        return "required"
    return "" if value is None else str(getattr(value, "value", value))


def about(field: dataclasses.Field) -> str:
    """Returns what a flag does, and what it may be."""
    said = " ".join(str(field.metadata.get("help", "")).split())
    choices = field.metadata.get("choices")
    return f"One of {', '.join(choices)}. {said}" if choices else said


def help_text(everything: bool = False) -> str:
    """Returns the text, wrapped to the terminal; ``everything`` has the Trainer's flags too."""
    groups = {TITLES[cls.__name__]: own_fields(cls) for cls in FLAGS}
    if everything:
        groups["Hugging Face's TrainingArguments"] = their_fields()
    parts = [USAGE]
    for title, flags in groups.items():
        parts.append(f"{title}:\n" + "\n".join(map(_entry, flags)) + "\n")
    return "\n".join(parts if everything else [*parts, THEIRS])


def _entry(field: dataclasses.Field) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    default = default_of(field)
    said = f"{about(field)} ({default})" if default else about(field)
    body = textwrap.wrap(said, width - 8) or [""]
    return "\n".join([f"  --{field.name}", *(f"        {line}" for line in body)])
