"""Fetching published data sets: which columns are kept, what is written, and the errors.

One of the errors is that of a hub that cannot be reached.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from datasets import Dataset

from stanford_alpaca.data import fetch, formats
from stanford_alpaca.errors import UserError

ROWS = [
    {
        "instruction": "Give three tips.",
        "input": "",
        "output": "1. Eat “well”.",
        "text": "Below is ...",
    },
    {
        "instruction": "Odd one out?",
        "input": "Twitter, Telegram",
        "output": "Telegram",
        "text": "Below is ...",
    },
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the hub, and returns the list of the names and splits that were asked for."""
    asked = []

    def load_dataset(name, split, cache_dir, streaming):
        asked.append((name, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(formats, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("name", "hub_name", "file"),
    [
        ("alpaca", "tatsu-lab/alpaca", "data/alpaca_data.json"),
        ("alpaca-gpt4", "vicgalle/alpaca-gpt4", "data/alpaca_gpt4_data.json"),
    ],
)
def test_a_set_is_written_in_alpacas_form(hub, capsys, name, hub_name, file):
    fetch.run(name)
    assert hub == [(hub_name, "train")]
    want = [{column: row[column] for column in ("instruction", "input", "output")} for row in ROWS]
    assert json.loads(Path(file).read_text()) == want
    # Training can read the file.
    assert list(formats.load_records(file, "cache")) == [
        row | {"system": "", "more": ""} for row in want
    ]
    printed = capsys.readouterr().out
    assert hub_name in printed and "CC BY-NC 4.0" in printed and "2 records" in printed
    assert f"sha256 {sha256(Path(file).read_bytes()).hexdigest()}" in printed
    assert f"DATA_PATH={file} bash train_emo.sh MODEL_PATH" in printed
    with pytest.raises(UserError, match="does not exist yet"):
        fetch.run(name)
    fetch.run(name, out="other/place.json")
    assert sorted(
        str(path) for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts
    ) == sorted([file, "other/place.json"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data set named; choose from alpaca, alpaca-gpt4"),
        (["alpaca_gpt4"], "unknown data set alpaca_gpt4; did you mean alpaca-gpt4?"),
        (["alpaca", "--ou", "x.json"], "unknown argument --ou; did you mean --out?"),
        (["alpaca", "--out"], "--out True: give the name"),
        (["alpaca", "--out", "x.txt"], "--out x.txt: give the name of a .json file"),
        (["alpaca", "--out", "file/x.json"], "is a file; give another path"),
        (["alpaca"], "tatsu-lab/alpaca: no such file, and the hub did not give it"),
    ],
)
def test_what_goes_wrong_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capfd, arguments, message
):
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fetch", *arguments])
    with pytest.raises(SystemExit) as ended:  # HF_HUB_OFFLINE makes the hub unreachable
        fetch.main()
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def disk_full(part, content):
        part.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(UserError, match="no space"):
        fetch.write_json(tmp_path / "a.json", ROWS)
    assert not list(tmp_path.iterdir())
