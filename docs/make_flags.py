"""Writes docs/flags.md from the dataclasses of flags: ``python docs/make_flags.py``."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from stanford_alpaca.run.arguments import FLAGS, TrainingArguments  # noqa: E402
from stanford_alpaca.run.trainer_flags import HONOURED, REFUSED  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
TITLES = {
    "ModelArguments": "The model",
    "DataArguments": "The data",
    "ObjectiveArguments": "The objective",
    "LoraArguments": "LoRA",
    "TrainingArguments": "The run",
}
HEAD = """\
# Flags of training

`python -m stanford_alpaca.train`, `train_emo.sh` and `finetune.sh` take these flags, and
`--config FILE` with lines `flag: value`. This page is written by `python docs/make_flags.py`.
"""
TABLE = "| flag | default | what it does |\n|---|---|---|"
THEIRS = """\
## Flags of Hugging Face's TrainingArguments

These {count} work as in the
[documentation of transformers](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).

{names}

These {refused} are refused, because here they would do nothing, or something else than they say:

| flag | why |
|---|---|
{rows}
"""


def own_fields(cls: type) -> list[dataclasses.Field]:
    """The flags that this package declares, without those that transformers has."""
    if cls is not TrainingArguments:
        return list(dataclasses.fields(cls))
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return [field for field in dataclasses.fields(cls) if field.name not in theirs]


def shown_default(field: dataclasses.Field) -> str:
    """A default as one would type it."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value: Any = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()  # type: ignore[misc]
    return "" if value is None else f"`{value}`"


def row(field: dataclasses.Field) -> str:
    """A flag's line in the table."""
    about = str(field.metadata.get("help", ""))
    if choices := field.metadata.get("choices"):
        about = f"One of {', '.join(f'`{choice}`' for choice in choices)}. {about}"
    return f"| `--{field.name}` | {shown_default(field)} | {about.replace('|', '&#124;')} |"


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for cls in FLAGS:
        rows = "\n".join(map(row, own_fields(cls)))
        parts.append(f"## {TITLES[cls.__name__]}\n\n{TABLE}\n{rows}\n")
    refused = "\n".join(f"| `--{name}` | {why} |" for name, why in REFUSED.items())
    names = ", ".join(f"`--{name}`" for name in sorted(HONOURED))
    parts.append(
        THEIRS.format(count=len(HONOURED), names=names, refused=len(REFUSED), rows=refused)
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
