"""Reads raw records from files and folders: JSON, JSON lines, CSV, parquet, Arrow or text.

Each value comes with the place where it stands.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.data.arrow_size import unpacked_sizes
from stanford_alpaca.data.strict_json import JSON, duplicate
from stanford_alpaca.errors import UserError, first_line, listed
from stanford_alpaca.flags import RECORD_LIMIT

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
TEXT_FILE, GZIPPED = ".txt", ".gz"
FILE_KINDS = (*DATA_SUFFIXES, TEXT_FILE)  # all but parquet may be gzipped
ARROW = ".arrow"  # files that ``datasets`` saved, see ``_saved_files``
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
ABOUT = (SAVED, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json")  # files about data
OF = r"(?<![a-z])({})(set|data|split)?(?![a-z])"  # a split in the name of a file or folder
TRAINING = re.compile(OF.format("train(ing)?"))
HELD_OUT = re.compile(OF.format("test(ing)?|val(id(ation)?)?|dev|eval(uation)?"))
WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where a word begins in a name like trainData
# how the file names of one set end
SHARD = re.compile(r"([-_.]?\d+(-of-\d+)?([-_][0-9a-f]{8,})?)?(\.\w+)+$")
HEAD = 4096  # bytes to read to recognise an encoding
WHOLE_OBJECT = 2**26  # bytes to read of a file that may be one object over several lines
SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space
# what may be held at a time, in records of the greatest size: a JSON list, unpacked rows
LISTS, BATCHES = 16, 4
OFFSETS = 2**10  # bytes that a row of Arrow may have beside its values
ROWS = 1000  # that are unpacked at a time, at most
REPEATS = re.compile("^dictionary|^run_end_encoded|_view")  # types of Arrow

_states: dict[str, tuple[int, ...]] = {}  # file -> size, time of change and number

Placed = tuple[str, object]  # a place, for error messages, and the value there


def _most() -> int:
    """Returns the most characters, or bytes, of a record."""
    return RECORD_LIMIT.mib << 20


def too_large(where: str) -> UserError:
    """Returns the error for a record that is larger than --max_record_mib."""
    return UserError(
        f"{where}: larger than {RECORD_LIMIT.mib} MiB; is it what it should be? "
        "--max_record_mib raises the limit"
    )


def lines_of(stream: IO[str], file: Path) -> Iterator[str]:
    """Yields the lines of a text file. Raises UserError for one that is larger than a record."""
    most, number = _most(), 0
    while line := stream.readline(most + 1):
        number += 1
        if len(line) > most:
            raise too_large(f"{file}:line {number}")
        yield line


def exists(path: Path) -> bool:
    """Returns whether a file or folder exists; False for a name that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def kind_of_file(path: Path) -> str:
    """Returns one of FILE_KINDS, or another ending of the name."""
    name = path.name.lower().removesuffix(GZIPPED)
    return path.suffix.lower() if name.endswith(".parquet") else Path(name).suffix


def open_text(file: Path, newline: str | None = None) -> IO[str]:
    """Opens a text file, gzipped or not, and skips a byte-order mark at its beginning."""
    if file.suffix.lower() == GZIPPED:
        return gzip.open(file, "rt", encoding="utf-8-sig", newline=newline)
    return file.open(encoding="utf-8-sig", newline=newline)


def list_data_files(path: Path) -> list[Path]:
    """Returns the data files that a path names: the file itself, or all files of a folder.

    Of a folder with splits, only the training split is returned. Text files count only in a folder
    without other data: beside data they are documentation. The folder may also be one that
    ``save_to_disk`` wrote.

    Raises:
        UserError: the path does not exist, or is another kind of file; or the folder has no data
            files, or several sets.
    """
    kinds = f"{', '.join(FILE_KINDS)}; all but .parquet also with {GZIPPED}"
    if not exists(path):
        raise UserError(
            f"{path}: no such file; give a file ({kinds}), a folder of them, or a hub name"
        )
    if not path.is_dir():
        if not path.is_file() or kind_of_file(path) not in (*FILE_KINDS, ARROW):
            raise UserError(
                f"{path}: not one of {kinds}; give such a file, a folder of them, or a hub name"
            )
        return [path]
    if (path / SAVED_SPLITS).is_file() or (path / SAVED).is_file():
        return _saved_files(path)
    names = {
        file: str(file.relative_to(path))
        for file in path.rglob("*")
        if kind_of_file(file) in FILE_KINDS
    }
    hidden = re.compile(r"(^|/)\.")  # files that a system or a tool keeps beside the data
    files = sorted(
        file for file, name in names.items() if not hidden.search(name) and file.name not in ABOUT
    )
    strange = next((file for file in files if not file.is_file()), None)
    if strange is not None:
        raise UserError(
            f"{strange}: has the name of a data file, and is a folder, a pipe, a device or a link "
            "that leads nowhere; take it out, or name one file"
        )
    files = [file for file in files if kind_of_file(file) != TEXT_FILE] or files
    if not files:
        saved = next(
            (file.parent for name in (SAVED_SPLITS, SAVED) for file in sorted(path.rglob(name))),
            None,
        )
        hint = f"; is it {saved}?" if saved else ""
        raise UserError(f"{path}: a folder without data files, wanted {kinds}{hint}")
    training = [file for file in files if TRAINING.search(_words(names[file]))]
    _check_one_set(path, {file: _set_of(names[file]) for file in training or files}, bool(training))
    return training or files


def _check_one_set(folder: Path, sets: dict[Path, str], are_training: bool) -> None:
    """Raises UserError if the files' folders and names say that they are not parts of one set."""
    kinds: dict[str, set[str]] = {}
    for file, name in sets.items():
        kinds.setdefault(name, set()).add(
            kind_of_file(file) + GZIPPED * (file.suffix.lower() == GZIPPED)
        )
    for name, found in kinds.items():
        if len(found) > 1:
            raise UserError(
                f"{folder}: {name or 'the data'} in several formats "
                f"({', '.join(sorted(found))}); name one file"
            )
    others = [name for name in kinds if not HELD_OUT.search(_words(name.rpartition("/")[2]))]
    alike = {TEXT_FILE} not in kinds.values() and len(
        {name.rpartition("/")[2] for name in kinds}
    ) < len(kinds)
    if len(kinds) > 1 and (are_training or alike or len(others) < len(kinds)):
        first = sorted(others or kinds)[0]
        files = [file for file, name in sets.items() if name == first]
        example = (
            str(files[0])
            if len(files) == 1
            else f"{folder}/{first}{'/' if (folder / first).is_dir() else '-'}*"
        )
        raise UserError(
            f"{folder}: several sets of data ({listed(sorted(kinds))}); "
            f"name one: --data_path {example}"
        )


def _set_of(name: str) -> str:
    """Returns the name of the set that a file belongs to.

    It is the file's path up to the part that names a split, without the number of a shard.
    """
    parts = name.split("/")
    split = next(
        (i for i, part in enumerate(parts[:-1]) if TRAINING.search(_words(part))), len(parts) - 1
    )
    return "/".join([*parts[:split], SHARD.sub("", parts[split])])


def _words(name: str) -> str:
    return WORD.sub("_", name).lower()


def _saved_files(folder: Path) -> list[Path]:
    """Returns the files of a data set that ``datasets`` saved; of several splits, ``train``."""
    try:
        if (folder / SAVED_SPLITS).is_file():
            splits = list(read_json(folder / SAVED_SPLITS)["splits"])
            if "train" not in splits and len(splits) != 1:
                raise UserError(
                    f"{folder}: several splits ({', '.join(splits)}); "
                    f"name one: --data_path {folder}/{splits[0]}"
                )
            folder = folder / ("train" if "train" in splits else splits[0])
        state = read_json(folder / SAVED)
        files = [folder / Path(shard["filename"]).name for shard in state["_data_files"]]
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder}: cannot be read as a saved data set ({first_line(error)}); save it again"
        ) from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{folder}: a saved data set without its file {', '.join(missing)}; save it again"
        )
    if not files:
        raise UserError(f"{folder}: there is no record in it; save a set with at least one")
    return files


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raises UserError where a file cannot be read, is broken gzip, or is not UTF-8."""
    try:
        try:
            yield
        except UnicodeDecodeError:  # looking for the byte reads the file anew, which may fail too
            raise UserError(
                f"{file}: byte {_bad_byte(file)} is not UTF-8; convert the file to UTF-8"
            ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None


def read_file(file: Path, whole_lists: bool = True) -> Iterator[Placed]:
    """Yields the values of one file, one record at a time. A line of a text file is a record.

    Only a JSON list is read as a whole. Without ``whole_lists`` it is refused.

    Raises:
        UserError: the file cannot be read, or a record in it is broken.
    """
    kind = kind_of_file(file)
    with readable(file):
        if kind == ".parquet":
            yield from _parquet(file)
        elif kind == ARROW:
            yield from _arrow(file)
        elif _has_nul(file):
            raise UserError(
                f"{file}: holds NUL characters, as UTF-16 does; convert the file to UTF-8"
            )
        elif kind == TEXT_FILE:
            yield from _lines(file)
        elif kind in (".csv", ".tsv"):
            yield from _csv(file, "\t" if kind == ".tsv" else ",")
        elif _starts_with_bracket(file):
            if not whole_lists:
                raise UserError(
                    f"{file}: a JSON list has to be read as a whole; "
                    "for --streaming give one object a line"
                )
            yield from _json_list(file)
        else:
            yield from _json_lines(file)


def _has_nul(file: Path) -> bool:
    with (gzip.open if file.suffix.lower() == GZIPPED else open)(file, "rb") as stream:
        head = stream.read(HEAD)
    # a file with UTF-16's byte-order mark gets the error that names its first bad byte
    return b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _lines(file: Path) -> Iterator[Placed]:
    with open_text(file) as stream:
        for number, line in enumerate(lines_of(stream, file), 1):
            yield f"{file}:line {number}", {"text": line.removesuffix("\n")}


def _starts_with_bracket(file: Path) -> bool:
    with open_text(file) as stream:
        while (block := stream.read(HEAD)) and not block.strip():
            pass
    return block.lstrip()[:1] == "["


def _json_list(file: Path) -> Iterator[Placed]:
    with open_text(file) as whole:
        text = whole.read(LISTS * _most() + 1)
    if len(text) > LISTS * _most():
        raise UserError(
            f"{file}: a JSON list of more than {LISTS * RECORD_LIMIT.mib:,} MiB, which has to be "
            "read as a whole; write one object a line, or raise the limit with --max_record_mib"
        )
    place, mark, number = _skip_space(text, text.index("[") + 1), ",", 0
    if text[place : place + 1] == "]":
        place, mark = place + 1, "]"
    while mark == ",":
        number += 1
        where = f"{file}:record {number}"
        try:
            value, place, mark = _element(text, place)
        except (ValueError, RecursionError) as error:
            at = (
                f" at line {error.lineno} column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else ""
            )
            raise UserError(
                f"{where}: broken JSON{at}, {_reason(error)}; is the file complete?"
            ) from None
        yield where, value
    if _skip_space(text, place) < len(text):
        raise UserError(
            f"{file}: broken JSON, something stands after the list; wanted a list and nothing else"
        )


def _element(text: str, place: int) -> tuple[object, int, str]:
    """Returns the element of a list at a place, where the next one begins, and "," or "]".

    The last is the character after the element.
    """
    value, place = JSON.raw_decode(text, place)
    place = _skip_space(text, place)
    if text[place : place + 1] not in (",", "]"):
        raise json.JSONDecodeError("expecting ',' or ']'", text, place)
    return value, _skip_space(text, place + 1), text[place]


def _json_lines(file: Path) -> Iterator[Placed]:
    with open_text(file, newline="\n") as stream:
        is_first = True
        for number, line in enumerate(lines_of(stream, file), 1):
            if not line.strip():
                continue
            where = f"{file}:line {number}"
            try:
                value = JSON.decode(line.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                wanted = "wanted a list or an object a line"
                if is_first and (hint := _one_object(file)):
                    raise UserError(f"{file}: {hint}; {wanted}") from None
                raise UserError(f"{where}: broken JSON{at}, {_reason(error)}; {wanted}") from None
            yield where, value
            is_first = False


def _one_object(file: Path) -> str:
    """Returns what to do with a file that is one object over several lines, or "" for another."""
    try:
        with open_text(file) as stream:
            whole = JSON.decode(stream.read(WHOLE_OBJECT))
    except (ValueError, RecursionError):
        return ""
    if not isinstance(whole, dict):
        return ""
    lists = [
        name
        for name, value in whole.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if lists and not {"role", "from"} & {
        key for record in whole[lists[0]] if isinstance(record, dict) for key in record
    }:
        return (
            f"one object over several lines, with records under {lists[0]!r}: write that list alone"
        )
    return "one object over several lines: put it into a list, between [ and ]"


def _skip_space(text: str, place: int) -> int:
    return SPACE.match(text, place).end()  # type: ignore[union-attr]


def _reason(error: Exception) -> str:
    """Returns what is wrong with a text that is no JSON."""
    return (
        "nested too deep"
        if isinstance(error, RecursionError)
        else getattr(error, "msg", first_line(error))
    )


def _csv(file: Path, delimiter: str) -> Iterator[Placed]:
    csv.field_size_limit(_most())
    with open_text(file, newline="") as stream:
        lines = lines_of(stream, file)
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            twice = duplicate(reader.fieldnames or [])
            if twice is not None:
                raise UserError(
                    f"{file}:line 1: the column {twice!r} stands twice; give each a name of its own"
                )
            for row in reader:
                where = f"{file}:line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(
                        f"{where}: not the {len(reader.fieldnames or [])} fields of the first "
                        "line; is a quote open?"
                    )
                yield where, row
        except csv.Error as error:
            if "field limit" in str(error):
                raise too_large(f"{file}:line {reader.line_num}") from None
            place = f"line {reader.line_num}" if next(lines, None) is not None else "the end"
            raise UserError(f"{file}: broken CSV at {place}, {error}; is a quote open?") from None


def _parquet(file: Path) -> Iterator[Placed]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            twice = duplicate(table.schema_arrow.names)
            if twice is not None:
                raise UserError(
                    f"{file}: the column {twice!r} stands twice; give each a name of its own"
                )
            for batch in table.iter_batches(batch_size=_rows_at_a_time(table, file)):
                if batch.nbytes > BATCHES * _most():
                    raise too_large(f"{file}:record {number + 1} or one after it")
                most = _most() + OFFSETS
                for place in range(batch.num_rows if batch.nbytes > most else 0):
                    if batch.slice(place, 1).nbytes > most:
                        raise too_large(f"{file}:record {number + place + 1}")
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:record {number}", without_nulls(row)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: broken parquet, {first_line(error)}; is the file complete?"
        ) from None


def _rows_at_a_time(table: pq.ParquetFile, file: Path) -> int:
    """Returns how many rows of a parquet file are unpacked at a time.

    A value stands once in its column's chunk, however many rows repeat it. So the size of a group's
    chunks bounds a row, and so many rows have at most BATCHES times the limit.
    """
    groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    if any(group.total_byte_size > _most() * max(1, group.num_rows) for group in groups):
        raise too_large(f"{file}:a record")
    largest = max((group.total_byte_size for group in groups), default=0)
    return max(1, min(ROWS, BATCHES * _most() // max(1, largest)))


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Removes the nulls from the objects in a row of a table.

    A table puts them where an object lacks a field that others have.
    """
    return {
        name: _without_nulls(value) if isinstance(value, dict | list) else value
        for name, value in row.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _arrow(file: Path) -> Iterator[Placed]:
    number = 0
    try:
        with pa.memory_map(str(file)) as source:
            if any(size > BATCHES * _most() for size in unpacked_sizes(source)):
                raise too_large(f"{file}:a compressed batch of records")
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as table:
            _check_types(file, table.schema)
            for batch in table:
                batch.validate(full=True)  # a wrong offset would point outside
                for rows in _slices(batch):
                    if rows.nbytes > _most():
                        raise too_large(f"{file}:record {number + 1}")
                    for row in rows.to_pylist():
                        number += 1
                        yield f"{file}:record {number}", without_nulls(row)
            if source.tell() < source.size():  # zeros in a damaged file end the stream
                raise UserError(
                    f"{file}: broken Arrow, it ends after {number:,} records, before the file "
                    "does; save it again"
                )
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: broken Arrow, {first_line(error)}; is the file complete?"
        ) from None


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yields slices of a batch with at most ROWS rows and the size of a record, or a single row."""
    if len(batch) > 1 and (len(batch) > ROWS or batch.nbytes > _most()):
        half = len(batch) // 2
        yield from _slices(batch.slice(0, half))
        yield from _slices(batch.slice(half))
    else:
        yield batch


def _check_types(file: Path, schema: pa.Schema) -> None:
    """Raises UserError for types in which one value may stand for many. ``datasets`` has none."""
    rest = list(schema)
    while rest:
        field = rest.pop()
        if REPEATS.search(str(field.type).partition("<")[0]):
            raise UserError(
                f"{file}: the column {field.name!r} is {field.type}, in which one value may stand "
                "for many; save it with plain values"
            )
        rest += [field.type.field(i) for i in range(field.type.num_fields)]


def _bad_byte(file: Path) -> int:
    """Returns the position of the first bad byte in the file.

    A text file is decoded in pieces, and the position in the error counts from the piece.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with (gzip.open if file.suffix.lower() == GZIPPED else open)(file, "rb") as stream:
        while block := stream.read(2**20):
            kept = len(decoder.getstate()[0])  # bytes of a character that goes on in this block
            try:
                decoder.decode(block)
            except UnicodeDecodeError as found:
                return done - kept + found.start
            done += len(block)
    return done - len(decoder.getstate()[0])  # a character that the end of the file cuts


def remember(files: list[Path]) -> None:
    """Remembers the state of files that are about to be hashed, for ``check_unchanged``."""
    _states.update((str(file), _state_of(file)) for file in files)


def check_unchanged(file: Path) -> None:
    """Raises UserError if a file is not what it was when ``remember`` saw it."""
    if str(file) in _states and _states[str(file)] != _state_of(file):
        raise UserError(f"{file}: changed while it was read; run the command again")


def _state_of(file: Path) -> tuple[int, ...]:
    try:
        about = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    return about.st_size, about.st_mtime_ns, about.st_ino


def digest_of(files: list[Path], contents: bool = True) -> str:
    """Returns a sha256 over the names, sizes and contents of files.

    Without ``contents`` it covers only names and sizes, for data that are too large to read twice.
    """
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
