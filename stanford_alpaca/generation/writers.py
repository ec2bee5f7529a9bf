"""Shows and writes samples: on the terminal, as JSON lines, for AlpacaEval, as a page of Markdown.

A sample is a dict with ``instruction``, ``input``, ``reference`` and ``responses``. ``input`` and
``reference`` may be empty. ``responses`` is {checkpoint: text}, or {checkpoint: [text, ...]} if
several were drawn per prompt. If its record names a ``dataset``, the sample has it too.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from stanford_alpaca.checkpoint.files import append_lines, check_new, write_new
from stanford_alpaca.data.prompts import as_shown
from stanford_alpaca.errors import UserError


def check_outputs(flags: dict[str, str | None]) -> dict[str, Path]:
    """Returns the files of the flags that were given.

    Raises:
        UserError: a file exists already, cannot be written, or stands in the place of another one.
    """
    files: dict[str, Path] = {}
    for flag, name in flags.items():
        if name is None:
            continue
        file = check_new(flag, name)
        for other, taken in files.items():
            here, there = file.resolve(), taken.resolve()
            if here == there or here in there.parents or there in here.parents:
                raise UserError(
                    f"--{flag} {file} and --{other} {taken} are in each other's place: "
                    "give them two files"
                )
        files[flag] = file
    return files


def labelled(sample: dict[str, Any]) -> list[tuple[str, int | None, str]]:
    """Returns every response of a sample as (checkpoint, number, text).

    The number counts from 1. It is None if the checkpoint gave a single response.
    """
    rows: list[tuple[str, int | None, str]] = []
    for name, texts in sample["responses"].items():
        rows += (
            [(name, None, texts)]
            if isinstance(texts, str)
            else [(name, n, text) for n, text in enumerate(texts, 1)]
        )
    return rows


def format_sample(sample: dict[str, Any]) -> str:
    """Formats a sample for the terminal: prompt, reference if any, and all responses."""
    lines = [f"instruction: {sample['instruction']}"]
    if sample["input"]:
        lines.append(f"input:       {sample['input']}")
    if sample["reference"]:
        lines.append(f"reference:   {sample['reference']}")
    rows = [
        (name if number is None else f"{name} {number}", text)
        for name, number, text in labelled(sample)
    ]
    width = max(len(label) for label, _ in rows)
    lines += [f"  {label:<{width}} | {text}" for label, text in rows]
    return "\n".join(lines) + "\n"


def sample_of(record: dict, responses: dict[str, str | list[str]]) -> dict[str, Any]:
    """Returns the sample of a record of any form with the responses of each checkpoint."""
    return (
        as_shown(record)
        | {key: record[key] for key in ("dataset",) if key in record}
        | {"responses": responses}
    )


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object per line. A missing folder is created."""
    write_new(file, _as_jsonl(rows))


def append_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """Appends one JSON object per line to what the file already holds."""
    append_lines(file, _as_jsonl(rows))


def _as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_alpaca_eval(file: Path, samples: list[dict[str, Any]]) -> None:
    """Writes what AlpacaEval takes as ``model_outputs``.

    The samples come from one checkpoint, with one response each. AlpacaEval finds the answers to
    compare by the instruction. There it includes the input, after an empty line. The generator is
    the name of the checkpoint's folder.
    """
    rows = []
    for sample in samples:
        ((checkpoint, output),) = sample["responses"].items()
        row = {
            "instruction": "\n\n".join(filter(None, (sample["instruction"], sample["input"]))),
            "output": output,
            "generator": Path(os.path.abspath(checkpoint)).name,
        }
        rows.append(row | {key: sample[key] for key in ("dataset",) if key in sample})
    write_new(file, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def write_markdown(file: Path, samples: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Writes a page to read: the settings, then each prompt, its reference and the responses."""
    title = [
        "# Samples",
        ", ".join(f"{code_span(name)} {value}" for name, value in settings.items()),
    ]
    write_new(file, "\n\n".join([*title, samples_as_markdown(samples)]) + "\n")


def samples_as_markdown(samples: list[dict[str, Any]]) -> str:
    """Returns each prompt, its reference and the responses as Markdown.

    Every text from outside stands in a fenced block or a code span, so nothing in it is markup.
    """
    page = []
    for number, sample in enumerate(samples, 1):
        page.append(f"## Prompt {number}")
        for title in ("instruction", "input", "reference"):
            if sample[title]:
                page += [f"**{title.capitalize()}**", fenced(sample[title])]
        for name, index, text in labelled(sample):
            page += [
                f"**Response{'' if index is None else f' {index}'} of** {code_span(name)}",
                fenced(text),
            ]
    return "\n\n".join(page)


def fenced(text: str) -> str:
    """Returns the text as a fenced block. The fence is longer than any run of backticks in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def code_span(text: str) -> str:
    """Returns the text as a code span on one line of Markdown."""
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
