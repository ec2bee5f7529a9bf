"""Writes docs/flags.md from the dataclasses of flags: ``python docs/make_flags.py``."""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stanford_alpaca.run.arguments import FLAGS  # noqa: E402
from stanford_alpaca.run.help import TITLES, about, default_of, own_fields  # noqa: E402
from stanford_alpaca.run.trainer_flags import HONOURED, REFUSED  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
HEAD = """\
# Flags of training

`emo train`, `python -m stanford_alpaca.train`, `train_emo.sh` and `finetune.sh` take these flags,
and `--config FILE` with lines `flag: value`. `emo train --help` prints them. This page is written
by `python docs/make_flags.py`.
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


def row(field: dataclasses.Field) -> str:
    """Returns a flag's line in the table."""
    default = default_of(field)
    shown = f"`{default}`" if default not in ("", "required") else default
    return f"| `--{field.name}` | {shown} | {about(field).replace('|', '&#124;')} |"


def page() -> str:
    """Returns the page as Markdown."""
    parts = [HEAD]
    for cls in FLAGS:
        rows = "\n".join(map(row, own_fields(cls)))
        parts.append(f"## {TITLES[cls.__name__]}\n\n{TABLE}\n{rows}\n")
    refused = "\n".join(f"| `--{name}` | {why} |" for name, why in REFUSED.items())
    names = ", ".join(f"`--{name}`" for name in sorted(HONOURED))
    counts = {"count": len(HONOURED), "refused": len(REFUSED)}
    parts.append(THEIRS.format(names=names, rows=refused, **counts))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
