"""Documents from text, gzipped text and records: which lines and rows make one document."""

import gzip
import json

import pytest

from stanford_alpaca.data.formats import load_records
from stanford_alpaca.errors import UserError

WIKITEXT = [
    "",
    " = First = ",
    "",
    " one ",
    " = = Part = = ",
    " two ",
    "",
    " = Second = ",
    " three ",
    "",
]


def texts(path, tmp_path, **options):
    return load_records(path, str(tmp_path / "cache"), **options)["text"]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("auto", [" = First = \n\n one \n = = Part = = \n two ", " = Second = \n three "]),
        ("file", [" = First = \n\n one \n = = Part = = \n two \n\n = Second = \n three "]),
        ("blank", [" = First = ", " one \n = = Part = = \n two ", " = Second = \n three "]),
        ("row", [" = First = ", " one ", " = = Part = = ", " two ", " = Second = ", " three "]),
    ],
)
def test_the_rules_on_lines_and_on_rows(tmp_path, rule, want):
    (tmp_path / "a.txt").write_text("\n".join(WIKITEXT))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(WIKITEXT).encode()))
    # Each row ends with a line break, as on the hub.
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{row}\n"}) for row in WIKITEXT)
    )
    for name in ("a.txt", "a.txt.gz"):
        assert texts(tmp_path / name, tmp_path, documents=rule) == want
    rows = texts(tmp_path / "a.jsonl", tmp_path, documents=rule)
    assert [row.removesuffix("\n") for row in rows] == want


def test_auto_without_titles_a_text_file_is_a_document_and_a_row_is_one(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "texts" / "b.txt").write_text("\n\n three\n")
    assert texts(tmp_path / "texts", tmp_path) == ["one\n\ntwo", " three"]
    (tmp_path / "texts" / "c.jsonl").write_text(
        '{"text": "four\\n"}\n{"text": " "}\n{"text": "five"}\n'
    )
    # Text files beside data files describe the data and are not read.
    assert texts(tmp_path / "texts", tmp_path, documents="auto") == ["four\n", "five"]
    assert texts(tmp_path / "texts", tmp_path) == ["four\n", " ", "five"]


def test_the_first_sentences_are_lines_that_are_not_blank_over_all_files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (("a", "1\n\n2\n"), ("b", "3\n4\n")):
        (folder / f"{name}.txt").write_text(text)
    assert texts(folder, tmp_path, documents="row", max_sentences=3) == ["1", "2", "3"]
    assert texts(folder, tmp_path, documents="file", max_sentences=1) == ["1"]


def test_gzipped_records_and_damaged_ones(tmp_path):
    packed = gzip.compress(json.dumps([{"instruction": "a", "output": "b"}]).encode())
    (tmp_path / "a.json.gz").write_bytes(packed)
    assert load_records(tmp_path / "a.json.gz", str(tmp_path / "cache"))[0]["output"] == "b"
    for name, data in (("cut", packed[:-9]), ("no", b"text")):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}.jsonl.gz: cannot be read"):
            load_records(tmp_path / f"{name}.jsonl.gz", str(tmp_path / "cache"))
    (tmp_path / "latin.txt.gz").write_bytes(gzip.compress("a\ncaf\xe9".encode("latin-1")))
    with pytest.raises(UserError, match="byte 5 is not UTF-8"):
        load_records(tmp_path / "latin.txt.gz", str(tmp_path / "cache"))
