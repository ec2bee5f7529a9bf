"""Tests that the pages of docs/ match what the code does."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from stanford_alpaca.data.records import form_of, parse_record
from stanford_alpaca.data.templates import use_chat_template
from stanford_alpaca.data.tokenize import ExampleEncoder
from stanford_alpaca.preview import coloured, pieces_of
from stanford_alpaca.run.arguments import OLDER_NAMES

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


@pytest.mark.skipif(OLDER_NAMES, reason="the page has the flags of the tested transformers")
def test_the_page_of_flags_is_what_the_dataclasses_say(root):
    spec = importlib.util.spec_from_file_location("make_flags", root / "docs" / "make_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (root / "docs" / "flags.md").read_text(encoding="utf-8")
    assert written == module.page(), "run: python docs/make_flags.py"


def test_the_documentation_builds_without_a_warning(root, tmp_path):
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    ended = subprocess.run([*build, root / "docs", tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "linear_emo_loss" in (tmp_path / "loss.html").read_text(encoding="utf-8")


def test_links_lead_somewhere(root):
    pages = [root / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    for page in [*pages, *(root / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_front_page_is_short(root):
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100
