"""Data of strangers: what is unpacked is bounded, what is no file is named, changes are noticed."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from stanford_alpaca import merge_lora, preview
from stanford_alpaca.cost.build import documents
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.reading import list_data_files, read_file
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import RECORD_LIMIT, command
from stanford_alpaca.run.data import load_data
from stanford_alpaca.run.flag_checks import check
from stanford_alpaca.run.parse import parse
from stanford_alpaca.train import train

MIB = 2**20
LINE = json.dumps({"instruction": "a", "output": "x" * 2 * MIB})


@pytest.fixture
def one_mib(monkeypatch):
    """Limits a record to 1 MiB."""
    monkeypatch.setattr(RECORD_LIMIT, "mib", 1)


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


LARGE = {
    "a.jsonl": (LINE.encode(), "a.jsonl:line 1: larger than 1 MiB"),
    "b.jsonl": (b'{"text": "a"}\n' + LINE.encode(), "b.jsonl:line 2: larger than 1 MiB"),
    "a.jsonl.gz": (LINE.encode(), "a.jsonl.gz:line 1: larger than 1 MiB"),
    "a.txt": (b"x" * 2 * MIB, "a.txt:line 1: larger than 1 MiB"),
    "a.csv": (b"text\n" + b"x" * 2 * MIB, "a.csv:line 2: larger than 1 MiB"),
    "b.csv": (b'text\n"' + b"x\n" * 2 * MIB + b'"', "larger than 1 MiB"),
    "a.tsv.gz": (b"x" * 2 * MIB, "a.tsv.gz:line 1: larger than 1 MiB"),
    "a.json": (b"[" + b" " * 17 * MIB + b"]", "a JSON list of more than 16 MiB"),
    "a.json.gz": (b"[" + b" " * 17 * MIB + b"]", "a JSON list of more than 16 MiB"),
    "b.json.gz": (b" " * 3 * MIB + b"[1]", None),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_unpacked_of_a_text_file_is_bounded(tmp_path, one_mib, name):
    content, said = LARGE[name]
    file = write(tmp_path / name, content)
    if said is None:
        assert list(read_file(file)) == [(f"{file}:record 1", 1)]
        return
    with pytest.raises(UserError) as refused:
        list(read_file(file))
    assert said in str(refused.value) and "--max_record_mib" in str(refused.value)
    RECORD_LIMIT.mib = 4
    if said.endswith("1 MiB") and "b.csv" not in name:
        list(read_file(file))


def test_text_for_a_cost_is_bounded_too(tmp_path, one_mib):
    file = write(tmp_path / "a.txt.gz", b"x" * 2 * MIB)
    with pytest.raises(UserError, match=r"a\.txt\.gz:line 1: larger than 1 MiB"):
        list(documents(file))
    lines = b"one\n\n" + b"two words\n" * (MIB // 8) + b"\nthree\n"
    write(file, lines)
    with pytest.raises(UserError, match=r"a\.txt\.gz:a paragraph: larger than 1 MiB"):
        list(documents(file))
    RECORD_LIMIT.mib = 2
    assert [len(text) for text in documents(file)] == [3, 10 * (MIB // 8) - 1, 5]


def save_arrow(file: Path, table: pa.Table, compression: str | None = None) -> Path:
    """Writes one record batch, as ``datasets`` does where nothing is compressed."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(file), table.schema, options=options) as stream:
        stream.write_table(table)
    return file


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_batches_of_arrow_are_bounded_before_they_are_unpacked(
    tmp_path, one_mib, compression
):
    file = save_arrow(tmp_path / "a.arrow", pa.table({"text": ["x" * MIB] * 64}), compression)
    assert file.stat().st_size < MIB
    kept = pa.default_memory_pool().bytes_allocated()
    records = read_file(file)
    with pytest.raises(UserError, match=r"a\.arrow:a compressed batch of records: larger than 1 M"):
        next(records)
    assert pa.default_memory_pool().bytes_allocated() == kept
    few = pa.table({"text": ["x" * (MIB - 64)] * 3})
    assert len(list(read_file(save_arrow(file, few, compression)))) == 3


def test_rows_of_arrow_are_bounded(tmp_path, one_mib):
    few = pa.table({"text": [*["a"] * 2500, "x" * (MIB - 64), *["b" * 900] * 1500]})
    file = save_arrow(tmp_path / "a.arrow", few)
    assert [record["text"] for _, record in read_file(file)] == few["text"].to_pylist()
    save_arrow(file, pa.table({"text": ["a", "b", "x" * 2 * MIB, "c"]}))
    with pytest.raises(UserError, match=r"a\.arrow:record 3: larger than 1 MiB"):
        list(read_file(file))
    RECORD_LIMIT.mib = 3
    assert len(list(read_file(file))) == 4


REPEATED = {
    "dictionary": pa.array(["x"] * 9).dictionary_encode(),
    "dictionary in a list": pa.array([["x"] * 9], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([9]), pa.array(["x"])),
    "view": pa.array(["x"] * 9, pa.string_view()),
    "view of lists": pa.array([[1]], pa.list_view(pa.int8())),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_types_of_arrow_in_which_a_value_stands_for_many_are_refused(tmp_path, kind):
    file = save_arrow(tmp_path / "a.arrow", pa.table({"text": REPEATED[kind]}))
    with pytest.raises(UserError, match="in which one value may stand for many"):
        list(read_file(file))


def test_an_arrow_file_whose_offsets_point_outside_is_broken(tmp_path):
    file = save_arrow(tmp_path / "a.arrow", pa.table({"text": ["a", "b", "c"]}))
    content = file.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in range(4))
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, offsets[:-4] + (10**6).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"a\.arrow: broken Arrow"):
        list(read_file(file))


def test_rows_of_parquet_that_repeat_a_value_are_unpacked_a_few_at_a_time(tmp_path, one_mib):
    text = pa.array(["x" * MIB]).dictionary_encode()
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 3000), text.dictionary)
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2 * MIB  # 3 GiB of rows
    before = pa.default_memory_pool()
    most, count = 0, 0
    for _, record in read_file(tmp_path / "a.parquet"):
        most, count = max(most, before.bytes_allocated()), count + 1
        assert len(record["text"]) == MIB
    assert count == 3000 and most < 16 * MIB


def test_a_row_of_parquet_that_is_too_large_is_refused(tmp_path, one_mib):
    pq.write_table(pa.table({"text": ["x" * 2 * MIB]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a record: larger than 1 MiB"):
        list(read_file(tmp_path / "a.parquet"))
    texts = ["a", "x" * 9 * MIB, *["b"] * 20]
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="larger than 1 MiB"):
        list(read_file(tmp_path / "b.parquet"))
    RECORD_LIMIT.mib = 10
    assert len(list(read_file(tmp_path / "b.parquet"))) == 22


def test_the_bad_byte_of_a_large_file_is_found_in_pieces(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        file = write(tmp_path / name, b'{"text": "' + b"\xc3\xa9" * MIB + b"\xe2\x82" + b'"}')
        with pytest.raises(UserError, match=f"byte {10 + 2 * MIB} is not UTF-8"):
            list(read_file(file))


def test_every_command_has_the_flag(arguments, root, tmp_path, monkeypatch):
    monkeypatch.setattr(RECORD_LIMIT, "mib", 256)
    check(parse(arguments("--max_record_mib", "7")))
    assert RECORD_LIMIT.mib == 7
    seen = []
    run = command(preview.Options, lambda options: seen.append(RECORD_LIMIT.mib))
    run("model", max_record_mib=3)
    run("model")
    assert seen == [3, 256]
    assert "max_record_mib: the most MiB of a record" in run.__doc__
    with pytest.raises(UserError, match="unknown argument --max_record_mib"):  # reads no data
        merge_lora.run("model", max_record_mib=3)
    for wrong in (0, -1, 1.5, "x", True):
        with pytest.raises(UserError, match=f"--max_record_mib {wrong}: give a whole number"):
            run("model", max_record_mib=wrong)
    with pytest.raises(UserError, match="--max_record_mib 0: give a whole number from 1 on"):
        check(parse(arguments("--max_record_mib", "0", output_dir=tmp_path / "other")))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "socket"])
def test_what_is_no_file_in_a_folder_of_data_is_named(tmp_path, kind):
    write(tmp_path / "train-0.jsonl", b'{"text": "a"}\n')
    place = tmp_path / "train-1.jsonl"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "link":
        place.symlink_to("nowhere")
    else:
        os.mknod(place, 0o140600)
    with pytest.raises(UserError, match=r"train-1.jsonl: has the name of a data file, and is"):
        list_data_files(tmp_path)
    if kind != "folder":
        with pytest.raises(UserError, match=r"train-1.jsonl"):
            list_data_files(place)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", b'{"text": "a"}\n')

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read \(.*Permission denied"):
        load_records(file, str(tmp_path / "cache"))


def test_data_that_changes_between_hashing_and_reading_is_noticed(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' * 3)
    from stanford_alpaca.data import formats

    digest = formats.digest_of

    def then_changed(files: list[Path], contents: bool = True) -> str:
        found = digest(files, contents)
        files[0].write_bytes(b'{"text": "b"}\n' * 3)
        os.utime(files[0], ns=(1, 1))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(formats, "digest_of", then_changed)
        with pytest.raises(UserError, match=r"a.jsonl: changed while it was read"):
            load_records(file, str(tmp_path / "cache"))
    # what was read of it is not kept under the old content's name
    file.write_bytes(b'{"text": "a"}\n' * 3)
    assert load_records(file, str(tmp_path / "cache"))["text"] == ["a"] * 3


def test_a_run_notices_data_that_changes_after_its_record(arguments, tmp_path, monkeypatch):
    def changed(data, *args):
        with open(data.data_path[0], "a") as file:
            file.write(" ")
        return load_data(data, *args)

    monkeypatch.setattr("stanford_alpaca.train.load_data", changed)
    with pytest.raises(UserError, match=r"train.json: changed while it was read"):
        train(arguments())
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_a_line_of_gigabytes_takes_bounded_memory(tmp_path):
    """The file is sparse: 3 GiB of nothing after the first character."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'"' + b"x" * 5000)
    os.truncate(file, 3 * 2**30)
    code = (
        "import resource\nfrom pathlib import Path\n"
        "from stanford_alpaca.data.reading import read_file\n"
        "resource.setrlimit(resource.RLIMIT_AS, (5 * 2**30,) * 2)\n"
        f"list(read_file(Path({str(file)!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a.jsonl:line 1: larger than 256 MiB" in done.stderr.splitlines()[-1]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 5 * 2**30


@pytest.mark.parametrize("place", ["../outside.arrow", "/outside.arrow"])
def test_a_saved_set_names_no_file_outside_of_it(tmp_path, place):
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "outside.arrow")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": place if place[0] == "." else f"{tmp_path}{place}"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"without its file outside\.arrow"):
        list_data_files(tmp_path / "saved")


def test_a_row_of_parquet_is_bounded_and_named(tmp_path, monkeypatch):
    rows = [{"text": "a" * (3 * MIB if number == 20 else 1)} for number in range(22)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False)
    assert len(list(read_file(tmp_path / "a.parquet"))) == 22
    monkeypatch.setattr(RECORD_LIMIT, "mib", 1)
    with pytest.raises(UserError, match="record 21: larger than 1 MiB"):
        list(read_file(tmp_path / "a.parquet"))
