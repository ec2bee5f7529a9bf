"""From a file or a hub name to records: ``datasets.Dataset`` with the string columns instruction, input, output."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from datasets import Dataset, load_dataset

from stanford_alpaca.errors import UserError, first_line, quiet_hub

COLUMNS = ("instruction", "input", "output")
SUFFIXES = (".json", ".jsonl")


def load_records(path: str | Path, cache_dir: str | None = None) -> Dataset:
    """Reads Alpaca-form data: a JSON list or one JSON object a line from a file, else the train split of a hub set.

    Every record is checked before anything else happens. ``input`` may be absent; other columns are dropped.

    Raises:
        UserError: the path or the record that cannot be used, and what to do about it.
    """
    file = Path(path)
    if _exists(file) or file.suffix in SUFFIXES or str(path).startswith((".", "/", "~")):
        return _from_file(file.expanduser(), cache_dir)
    try:
        with quiet_hub():
            data = load_dataset(str(path), split="train", cache_dir=cache_dir)
    except Exception as error:  # the hub raises many kinds of errors: not found, no network, gated, a bad name
        raise UserError(f"{path}: no such file, and the hub did not give it ({first_line(error)})") from None
    for column in ("instruction", "output"):
        if column not in data.column_names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(data.column_names)}")
    for number, row in enumerate(data, 1):
        checked_record(row, f"{path}:record {number}")
    return Dataset.from_generator(_hub_rows, gen_kwargs={"data": data}, cache_dir=cache_dir)


def _from_file(file: Path, cache_dir: str | None) -> Dataset:
    if not _exists(file):
        raise UserError(f"{file}: no such file; give a .json or .jsonl file in Alpaca form, or a hub name")
    if not file.is_file() or file.suffix not in SUFFIXES:
        raise UserError(f"{file}: not a .json or .jsonl file; give a file in Alpaca form")
    content = file.read_bytes()
    records = [checked_record(record, where) for where, record in parse_file(file, content)]
    if not records:
        raise UserError(f"{file}: there is no record in it; give a list of objects with instruction and output")
    return Dataset.from_generator(  # on disk, so that what is derived from it is cached by its fingerprint
        _rows, gen_kwargs={"path": str(file), "digest": sha256(content).hexdigest()}, cache_dir=cache_dir
    )


def _rows(path: str, digest: str) -> Iterator[dict[str, str]]:
    """The generator behind the cached table; ``digest`` makes a changed file another table."""
    file = Path(path)
    for where, record in parse_file(file):
        yield checked_record(record, where)


def _hub_rows(data: Dataset) -> Iterator[dict[str, str]]:
    for row in data:
        yield checked_record(row, "")


def parse_file(file: Path, content: bytes | None = None) -> Iterator[tuple[str, object]]:
    """Pairs of a place, for messages, and whatever JSON value stands there: in a list, or one value a line."""
    content = file.read_bytes() if content is None else content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if text.lstrip()[:1] == "[":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: broken JSON, {error}; is the file complete?") from None
        yield from ((f"{file}:record {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{file}:line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{file}:line {number}: broken JSON, {error}; wanted a JSON list or one object a line"
                ) from None


def checked_record(record: object, where: str, needs_output: bool = True) -> dict[str, str]:
    """The record's three fields as strings. Raises UserError at the place ``where`` if it cannot be used."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, wanted an object with instruction and output")
    for column in ("instruction", "output") if needs_output else ("instruction",):
        if column not in record:
            raise UserError(f"{where}: no field {column!r}; it has {', '.join(map(str, record)) or 'none'}")
    row = {column: record.get(column, "") for column in COLUMNS}
    for column in ("input",) if needs_output else ("input", "output"):
        row[column] = "" if row[column] is None else row[column]
    for column, value in row.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {column!r} is a {type(value).__name__}, wanted a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {column!r} has a lone surrogate, which is no text; remove it") from None
    return row  # type: ignore[return-value]


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a name too long for the file system
        return False
