"""How samples are shown and written: the terminal, JSON lines, AlpacaEval's form, a page of Markdown.

A sample is a dict with ``instruction``, ``input``, ``reference`` (the last two may be empty), ``dataset`` if its record
named one, and ``responses``: {checkpoint: text}, or {checkpoint: [text, ...]} where several were drawn per prompt.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from stanford_alpaca.data.prompts import as_shown
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_writable


def check_outputs(flags: dict[str, str | None]) -> dict[str, Path]:
    """The files of the flags that were given. Raises UserError unless each is new, can be written, and is its own."""
    files: dict[str, Path] = {}
    for flag, name in flags.items():
        if name is None:
            continue
        file = Path(name)
        if name in ("", "True") or os.path.lexists(
            file
        ):  # fire's value for a flag that came without one is True
            raise UserError(f"--{flag} {name}: give the name of a file that does not exist yet")
        check_writable(flag, file)
        for other, taken in files.items():
            here, there = file.resolve(), taken.resolve()
            if here == there or here in there.parents or there in here.parents:
                raise UserError(
                    f"--{flag} {file} and --{other} {taken} are in each other's place: give them two files"
                )
        files[flag] = file
    return files


def labelled(sample: dict[str, Any]) -> list[tuple[str, int | None, str]]:
    """Every response of a sample: the checkpoint, a number from 1 on where it gave several, the text."""
    rows: list[tuple[str, int | None, str]] = []
    for name, texts in sample["responses"].items():
        rows += (
            [(name, None, texts)]
            if isinstance(texts, str)
            else [(name, n, text) for n, text in enumerate(texts, 1)]
        )
    return rows


def format_sample(sample: dict[str, Any]) -> str:
    """A sample for the terminal: the prompt, the reference if there is one, each checkpoint's responses."""
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
    """The sample of a record of any form and the responses of each checkpoint."""
    return (
        as_shown(record)
        | {key: record[key] for key in ("dataset",) if key in record}
        | {"responses": responses}
    )


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line; the folder is made if it is missing."""
    _write(file, _as_jsonl(rows))


def append_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """The same, after what the file holds already."""
    _write(file, _as_jsonl(rows), mode="a")


def _as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_alpaca_eval(file: Path, samples: list[dict[str, Any]]) -> None:
    """What AlpacaEval takes as ``model_outputs``, from samples of one checkpoint with one response each.

    AlpacaEval finds the answers to compare by the instruction, which there holds the input too, after an empty line. The
    generator is the name of the checkpoint's folder.
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
    _write(file, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def write_markdown(file: Path, samples: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """A page to read: the settings, then each prompt, its reference and the responses."""
    title = [
        "# Samples",
        ", ".join(f"{code_span(name)} {value}" for name, value in settings.items()),
    ]
    _write(file, "\n\n".join([*title, samples_as_markdown(samples)]) + "\n")


def samples_as_markdown(samples: list[dict[str, Any]]) -> str:
    """Each prompt, its reference and the responses.

    Every text that is not this function's own stands in a fenced block or a code span, so nothing in it is markup.
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
    """The text as a block of its own; the fence is longer than any run of backticks in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def code_span(text: str) -> str:
    """The text, on one line, within a line of Markdown."""
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _write(file: Path, text: str, mode: str = "w") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open(
        mode, encoding="utf-8", errors="backslashreplace"
    ) as stream:  # names of folders need not be UTF-8
        stream.write(text)
