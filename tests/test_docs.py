"""Tests that the pages of docs/ match what the code does."""

import json
import re

import pytest
from transformers import AutoTokenizer

from stanford_alpaca.data.records import form_of, parse_record
from stanford_alpaca.data.templates import use_chat_template
from stanford_alpaca.data.tokenize import ExampleEncoder
from stanford_alpaca.preview import coloured, pieces_of

# a record and its preview
SHOWN = re.compile(r"```json ?(\w*)\n(.*?)\n```\n\n```text\n(.*?)\n```", re.S)


@pytest.fixture
def tokenizer(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    use_chat_template(tokenizer, str(root / "examples" / "chat_template.jinja"))
    return tokenizer


def test_records_are_shown_as_the_preview_shows_them(root, tokenizer):
    found = SHOWN.findall((root / "docs" / "data.md").read_text(encoding="utf-8"))
    assert len(found) == 11 and found[-1][0] == "parse"
    for reading, record, shown in found:
        row = parse_record(json.loads(record), "docs/data.md")
        encode = ExampleEncoder.of(tokenizer, form_of(row), 512, "auto", reading or "text")
        assert coloured(pieces_of(row, encode), in_colour=False).plain == shown
