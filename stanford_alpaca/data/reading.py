"""From files and folders to raw records: whatever stands in JSON, JSON lines, CSV or parquet, and where it stands."""

import csv
import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stanford_alpaca.errors import UserError, first_line

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
csv.field_size_limit(2**31 - 1)  # the default refuses fields of 128 KiB

Placed = tuple[str, object]  # a place, for messages, and the value that stands there


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False for names that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def list_files(path: Path) -> list[Path]:
    """The data files that a path names: itself, or all in the folder, the training split of one with splits.

    Raises:
        UserError: no such path, another kind of file, or a folder without data files.
    """
    kinds = ", ".join(SUFFIXES)
    if not exists(path):
        raise UserError(f"{path}: no such file; give a file ({kinds}), a folder of them, or a hub name")
    if not path.is_dir():
        if not path.is_file() or path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: not one of {kinds}; give such a file, a folder of them, or a hub name")
        return [path]
    names = {file: str(file.relative_to(path)).lower() for file in path.rglob("*") if file.suffix.lower() in SUFFIXES}
    hidden = re.compile(r"(^|/)\.")  # what a system or a tool keeps beside the data
    files = sorted(file for file, name in names.items() if not hidden.search(name) and file.is_file())
    training = [file for file in files if re.search(r"(?<![a-z])train(ing)?(?![a-z])", names[file])]
    if not files:
        raise UserError(f"{path}: a folder without data files; wanted {kinds}")
    return training or files


def read_file(file: Path, whole_lists: bool = True) -> Iterator[Placed]:
    """The values of one file, a record at a time; only a JSON list is read as a whole, and refused on request."""
    try:
        if file.suffix.lower() == ".parquet":
            yield from _parquet(file)
        elif file.suffix.lower() in (".csv", ".tsv"):
            yield from _csv(file)
        elif _starts_with_bracket(file):
            if not whole_lists:
                raise UserError(f"{file}: a JSON list has to be read as a whole; for --streaming give one object a line")
            yield from _json_list(file)
        else:
            yield from _json_lines(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {_bad_byte(file, error)} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None


def _starts_with_bracket(file: Path) -> bool:
    with file.open(encoding="utf-8-sig") as lines:
        return next((line for line in lines if line.strip()), "").lstrip()[:1] == "["


def _json_list(file: Path) -> Iterator[Placed]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{file}: broken JSON, {error}; is the file complete?") from None
    for number, value in enumerate(values, 1):
        yield f"{file}:record {number}", value


def _json_lines(file: Path) -> Iterator[Placed]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{file}:line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{file}:line {number}: broken JSON, {error}; wanted a JSON list or one object a line"
                ) from None


def _csv(file: Path) -> Iterator[Placed]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                where = f"{file}:line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(
                        f"{where}: not the {len(reader.fieldnames or [])} fields of the first line; is a quote open?"
                    )
                yield where, row
        except csv.Error as error:
            place = f"line {reader.line_num}" if next(lines, None) is not None else "the end"
            raise UserError(f"{file}: broken CSV at {place}, {error}; is a quote open?") from None


def _parquet(file: Path) -> Iterator[Placed]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:record {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: broken parquet, {first_line(error)}; is the file complete?") from None


def _bad_byte(file: Path, error: UnicodeDecodeError) -> int:
    """Where in the file the first bad byte is: a text file decodes in pieces, and the error counts from its piece."""
    try:
        file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as whole:
        return whole.start
    return error.start


def digest_of(files: list[Path], contents: bool = True) -> str:
    """A sha256 over names and contents; without ``contents``, over names and sizes (data too large to be read twice)."""
    total = sha256()
    for file in files:
        total.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        if contents:
            try:
                with file.open("rb") as stream:
                    while block := stream.read(2**22):
                        total.update(block)
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    return total.hexdigest()
