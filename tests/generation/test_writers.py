"""Tests samples as text.

Any text comes back out of the page unchanged, and output files are checked before anything is
written.
"""

import json
import re

import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.generation.writers import (
    check_outputs,
    code_span,
    format_sample,
    write_alpaca_eval,
    write_markdown,
)

NASTY = "# head\n```\n<b>x</b> | y |\n````` \n~~~\n    - *a* `b` \\ &lt; $x$ @me\n---\n````text"
SAMPLE = {
    "instruction": "Say it.",
    "input": "",
    "reference": "",
    "responses": {"a": "One.", "long": "Two."},
}


def blocks(page):
    """Returns the contents of fenced blocks by CommonMark's rule, and the lines outside of them."""
    found, outside, fence, block = [], [], None, []
    for line in page.split("\n"):
        ticks = re.fullmatch(r" {0,3}(`{3,})([^`]*)", line)
        if fence is None and ticks:
            fence, block = ticks[1], []
        elif fence is None:
            outside.append(line)
        elif ticks and len(ticks[1]) >= len(fence) and not ticks[2].strip():
            found.append("\n".join(block))
            fence = None
        else:
            block.append(line)
    assert fence is None
    return found, outside


def test_markdown_holds_any_text_literally(tmp_path):
    file = tmp_path / "new" / "page.md"
    samples = [
        {
            "instruction": NASTY,
            "input": "`",
            "reference": "````````",
            "responses": {"out/`a`_b_<i>": NASTY, "c": "```"},
        },
        {"instruction": "Why?", "input": "", "reference": "", "responses": {"c": ["", "Two.\n"]}},
    ]
    write_markdown(file, samples, {"top_p": 0.9, "seed": 3})
    found, outside = blocks(file.read_text())
    assert found == [NASTY, "`", "````````", NASTY, "```", "Why?", "", "Two.\n"]
    assert [line for line in outside if line] == [
        "# Samples",
        "`top_p` 0.9, `seed` 3",
        "## Prompt 1",
        "**Instruction**",
        "**Input**",
        "**Reference**",
        "**Response of** `` out/`a`_b_<i> ``",
        "**Response of** `c`",
        "## Prompt 2",
        "**Instruction**",
        "**Response 1 of** `c`",
        "**Response 2 of** `c`",
    ]


def test_a_code_span_outlasts_the_backticks_in_it():
    assert code_span("a_b") == "`a_b`"
    assert code_span("``") == "``` `` ```"
    assert code_span("two\n\n# lines") == "`two # lines`"


def test_the_terminal_numbers_several_responses_side_by_side():
    assert format_sample(SAMPLE) == "instruction: Say it.\n  a    | One.\n  long | Two.\n"
    drawn = SAMPLE | {"responses": {"a": ["One.", "Two."], "long": ["Three.", "Four."]}}
    assert format_sample(drawn) == (
        "instruction: Say it.\n  a 1    | One.\n  a 2    | Two.\n"
        "  long 1 | Three.\n  long 2 | Four.\n"
    )


def test_alpaca_eval_joins_the_input_and_names_the_generator(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    samples = [
        {
            "instruction": "Say it. ",
            "input": "",
            "reference": "x",
            "responses": {"out/run/": "Oné."},
        },
        {
            "instruction": "Say",
            "input": "this.",
            "reference": "",
            "dataset": "koala",
            "responses": {".": ""},
        },
    ]
    write_alpaca_eval(tmp_path / "new" / "a.json", samples)
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == [
        {"instruction": "Say it. ", "output": "Oné.", "generator": "run"},
        {"instruction": "Say\n\nthis.", "output": "", "generator": "here", "dataset": "koala"},
    ]


def test_names_that_are_not_utf8_are_written_too(tmp_path):
    write_alpaca_eval(tmp_path / "a.json", [SAMPLE | {"responses": {"run-\udcff": "x"}}])
    assert json.loads((tmp_path / "a.json").read_text())[0]["generator"] == "run-\udcff"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": "True"}, "--out True: give the name of a file that does not exist yet"),
        ({"markdown": "kept"}, "--markdown kept: give the name"),
        ({"markdown": "folder"}, "--markdown folder: give the name"),
        ({"out": "dangling"}, "--out dangling: give the name"),
        ({"out": ""}, "--out : give the name"),
        ({"alpaca_eval": "kept/a.json"}, "kept is a file"),
        (
            {"out": "a", "markdown": "folder/../a"},
            "--markdown folder/../a and --out a are in each other's place",
        ),
        ({"out": "a", "alpaca_eval": "a/b"}, "--alpaca_eval a/b and --out a are"),
        ({"out": "a/b", "alpaca_eval": "a"}, "--alpaca_eval a and --out a/b are"),
    ],
    ids=str,
)
def test_files_that_cannot_be_written(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere/else")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(message)):
        check_outputs(flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_can(tmp_path):
    flags = {
        "out": str(tmp_path / "a" / "b"),
        "markdown": str(tmp_path / "a" / "c"),
        "alpaca_eval": None,
    }
    assert check_outputs(flags) == {"out": tmp_path / "a" / "b", "markdown": tmp_path / "a" / "c"}
