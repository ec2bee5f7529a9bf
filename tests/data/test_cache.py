"""Cached tables: damage is found and repaired, and an unusable cache is a one-line error."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from stanford_alpaca.data.blocks import make_blocks
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.run.data import hold_out

RECORDS = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(3000)]


@pytest.fixture
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "data" / "tiny-base")


def zero_the_second_half(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)


def zero_the_beginning(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[:100] = bytes(100)
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def examples(tmp_path, tokenizer):
    records = load_records(tmp_path / "data.json", str(tmp_path / "cache"))
    return tokenize_records(records, tokenizer, 64)[0]


@pytest.mark.parametrize(
    "damage", [zero_the_second_half, zero_the_beginning, cut, flip, Path.unlink]
)
@pytest.mark.parametrize("table", ["generator-*.arrow", "tokenized-*.arrow"])
def test_a_damaged_table_is_made_again(tmp_path, tokenizer, capsys, damage, table):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    wanted = examples(tmp_path, tokenizer)[:]
    (file,) = (tmp_path / "cache").rglob(table)
    capsys.readouterr()
    assert (
        examples(tmp_path, tokenizer)[:] == wanted and "made again" not in capsys.readouterr().out
    )
    damage(file)
    assert examples(tmp_path, tokenizer)[:] == wanted
    assert (
        "a cached table is not what was written there; it is made again" in capsys.readouterr().out
    )
    assert (
        examples(tmp_path, tokenizer)[:] == wanted and "made again" not in capsys.readouterr().out
    )


@pytest.mark.parametrize("table", ["generator-*.arrow", "tokenized-*.arrow"])
def test_a_table_without_a_check_is_made_again(tmp_path, tokenizer, capsys, table):
    """A run that is killed before it writes the check leaves such a table."""
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    wanted = examples(tmp_path, tokenizer)[:]
    for check in (tmp_path / "cache").rglob("*.check.json"):
        check.unlink()
    for file in (tmp_path / "cache").rglob(table):
        zero_the_second_half(file)
    assert examples(tmp_path, tokenizer)[:] == wanted and "made again" in capsys.readouterr().out


def test_processes_that_start_together_make_a_table_once(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    code = (
        "import sys; from stanford_alpaca.data.formats import load_records; "
        "print(len(load_records(*sys.argv[1:])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data.json"), str(tmp_path / "cache")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].splitlines() for process in started] == [["3000"], ["3000"]]


def test_blocks_of_running_text_are_checked_too(tmp_path, tokenizer, capsys):
    records = Dataset.from_dict({"text": [f"The year {i} was long." for i in range(4000)]})
    wanted = make_blocks(records, tokenizer, 16, cache_dir=str(tmp_path))[0][:]
    (file,) = tmp_path.rglob("generator-*.arrow")
    zero_the_second_half(file)
    assert make_blocks(records, tokenizer, 16, cache_dir=str(tmp_path))[0][:] == wanted
    assert "made again" in capsys.readouterr().out


def test_a_saved_set_that_ends_early_is_refused(tmp_path):
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    zero_the_second_half(file)
    with pytest.raises(
        UserError,
        match=r"broken Arrow, it ends after [\d,]+ records, before the file does; save it again",
    ):
        load_records(tmp_path / "saved", str(tmp_path / "cache"))


def test_a_file_in_the_place_of_the_cache_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS[:3]))
    (tmp_path / "cache").write_text("no folder")
    wanted = (
        r"cache: the cache of data cannot be used \(.*\); name another folder: "
        r"--cache_dir FOLDER, or HF_DATASETS_CACHE="
    )
    with pytest.raises(UserError, match=wanted):
        load_records(tmp_path / "data.json", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=wanted):
        load_records(tmp_path / "data.json")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(
    "writer",
    ["datasets.arrow_writer.ArrowWriter.finalize", "pathlib.Path.mkdir", "pathlib.Path.replace"],
)
def test_a_disk_that_cannot_be_written_is_one_line(
    tmp_path, tokenizer, monkeypatch, number, writer
):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS[:3]))
    records = load_records(tmp_path / "data.json", str(tmp_path / "other"))

    def fail(*args, **kwargs):
        raise OSError(number, "cannot be written")

    monkeypatch.setattr(writer, fail)
    with pytest.raises(UserError, match=r"the cache of data cannot be used .*cannot be written"):
        load_records(tmp_path / "data.json", str(tmp_path / "cache"))
    if writer != "pathlib.Path.mkdir":
        with pytest.raises(
            UserError, match=r"the cache of data cannot be used .*cannot be written"
        ):
            tokenize_records(records, tokenizer, 64)


@pytest.mark.parametrize("content", ["{", "{}", '{"features": {}}'])
def test_a_damaged_description_of_a_table_has_it_made_again(tmp_path, tokenizer, content):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    wanted = examples(tmp_path, tokenizer)[:]
    (file,) = (tmp_path / "cache").rglob("dataset_info.json")
    file.write_text(content)
    assert examples(tmp_path, tokenizer)[:] == wanted


def test_what_is_held_out_is_not_read_from_a_file(tmp_path, tokenizer):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    kept, held = hold_out(examples(tmp_path, tokenizer), 0.25, 42)
    assert len(kept) == 2250 and len(held) == 750
    assert not list((tmp_path / "cache").rglob("cache-*.arrow"))
