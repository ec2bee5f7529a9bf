"""What is read from files, and what each kind of broken file says."""

import json

import pytest

from stanford_alpaca.data.formats import load_records
from stanford_alpaca.errors import UserError

RECORDS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say {hello}.", "output": "hé \u2028 llo", "extra": 7},
    {"instruction": "Nothing.", "input": None, "output": ""},
]
ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say {hello}.", "input": "", "output": "hé \u2028 llo"},
    {"instruction": "Nothing.", "input": "", "output": ""},
]


def lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(RECORDS)),
        ("lines.jsonl", lines(RECORDS)),
        ("lines.json", lines(RECORDS)),
        ("bom.json", "\ufeff" + json.dumps(RECORDS)),
        ("crlf.jsonl", lines(RECORDS).replace("\n", "\r\n")),
    ],
)
def test_good_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert list(load_records(tmp_path / name, str(tmp_path / "cache"))) == ROWS


def test_a_changed_file_is_read_anew(tmp_path):
    file, cache = tmp_path / "data.json", str(tmp_path / "cache")
    file.write_text(json.dumps(RECORDS[:1]))
    assert load_records(file, cache)["output"][:] == ["3"]
    file.write_text(json.dumps([{**RECORDS[0], "output": "three"}]))
    assert load_records(file, cache)["output"][:] == ["three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[]", "there is no record"),
        ("a.json", b"", "there is no record"),
        ("a.json", b'[{"instruction": "a", "output": "b"}', r"broken JSON.*line 1 column 3"),
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n{"instr', "a.jsonl:line 2: broken JSON"),
        ("a.json", b'[{"instruction": "a"}]', "a.json:record 1: no field 'output'; it has instruction"),
        ("a.json", b'[{"output": "a"}]', "no field 'instruction'"),
        ("a.json", b'[{"instruction": "a", "output": null}]', "'output' is a NoneType, wanted a string"),
        ("a.json", b'[{"instruction": "a", "output": 3}]', "'output' is a int"),
        ("a.json", b'[{"instruction": "a", "input": [], "output": "b"}]', "'input' is a list"),
        ("a.json", b'["a"]', "record 1: a str, wanted an object"),
        ("a.json", b'"a"', "line 1: a str"),
        ("a.json", b'[{"instruction": "a", "output": "\\ud800"}]', "lone surrogate"),
        ("a.json", "é".encode("latin-1"), "byte 0 is not UTF-8"),
        ("a.json", '[{"instruction": "a", "output": "b"}]'.encode("utf-16"), "not UTF-8"),
        ("a.json", b"[" * 100_000, "broken JSON"),
        ("a.pkl", b"x", "not a .json or .jsonl file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_records(tmp_path / name, str(tmp_path / "cache"))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_records(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"not a \.json or \.jsonl file"):
        load_records(tmp_path)
    with pytest.raises(UserError, match="the hub did not give it"):
        load_records("nobody/nothing-here")


def test_a_hub_set_goes_the_same_way(tmp_path, monkeypatch):
    """The hub is out of reach here; what it would return is not."""
    from datasets import Dataset

    from stanford_alpaca.data import formats

    hub = {
        "good/set": Dataset.from_list([*RECORDS[:1], {"instruction": "a", "input": None, "output": "b"}]),
        "other/columns": Dataset.from_list([{"question": "a", "answer": "b"}]),
        "null/output": Dataset.from_list([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]),
    }
    monkeypatch.setattr(formats, "load_dataset", lambda name, split, cache_dir: hub[name])
    assert list(load_records("good/set", str(tmp_path))) == [ROWS[0], {"instruction": "a", "input": "", "output": "b"}]
    with pytest.raises(UserError, match="other/columns: no column 'instruction'; it has question, answer"):
        load_records("other/columns")
    with pytest.raises(UserError, match="null/output:record 2: 'output' is a NoneType"):
        load_records("null/output")
