"""From a file, a folder or a hub name to records of one form: ``datasets.Dataset`` with the columns of ``FORMS``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from stanford_alpaca.console import quiet_hub
from stanford_alpaca.data.cache import table
from stanford_alpaca.data.documents import Texts
from stanford_alpaca.data.reading import (
    FILE_KINDS,
    TEXT_FILE,
    Placed,
    digest_of,
    exists,
    kind_of_file,
    list_data_files,
    read_file,
    without_nulls,
)
from stanford_alpaca.data.records import FORMS, Record, form_of, parse_record
from stanford_alpaca.errors import UserError, first_line, listed, nearest

OTHERS = (
    "conversations",
    "history",
    "tools",
    "weight",
    "train",
    "role",
    "content",
)  # that --columns may name, too
RECORDS_VERSION = (
    4  # raise it when the same file would give other records, so that old caches are not used
)


def parse_columns(texts: list[str]) -> dict[str, str]:
    """--columns, texts like ``instruction=question`` (or several with commas), as a mapping from our names to the data's."""
    pairs = [part.partition("=") for text in texts for part in text.split(",")]
    known = [*dict.fromkeys(name for own in FORMS.values() for name in own), *OTHERS]
    known.remove("more")
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise UserError(
                f"--columns {ours}{equals}{theirs}: write OURS=THEIRS, as instruction=question"
            )
        if ours not in known:
            raise UserError(
                f"--columns {ours}={theirs}: {ours} is no column of ours{nearest(ours, known)}"
            )
    return {ours: theirs for ours, _, theirs in pairs}


def take_columns(flag: str | None, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """--columns of a command whose parser gives it the first value only, and the words without its other values."""
    if flag is None:
        return {}, words
    others = [word for word in words if "=" in word and not exists(Path(word))]
    return parse_columns([flag, *others]), [word for word in words if word not in others]


def check_columns(paths: list[str], columns: Mapping[str, str]) -> None:
    """Raises UserError for a name in --columns that the first record of no source has; hub sets are not asked."""
    sources = [local_files(path) for path in paths] if columns else []
    if not sources or None in sources:
        return
    seen: dict[str, None] = {}
    for files in sources:
        _, first = next(read_file(files[0]), ("", None))  # type: ignore[index]
        for record in (
            [first, *(v[0] for v in first.values() if isinstance(v, list) and v)]
            if isinstance(first, dict)
            else []
        ):
            seen |= dict.fromkeys(record if isinstance(record, dict) else ())
    for ours, theirs in columns.items():
        if theirs not in seen:
            raise UserError(
                f"--columns {ours}={theirs}: there is no {theirs!r}; the first record has {listed(seen)}"
            )


def load_records(
    path: str | Path,
    cache_dir: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,  # our name -> the name in the file
    streaming: bool = False,
    documents: str | None = None,
    max_sentences: int | None = None,
    train_history: bool = False,
) -> Dataset | IterableDataset:
    """Reads the records of a file, a folder of files, or the train split of a hub set (NAME or NAME:CONFIG), all of one form.

    ``documents`` and ``max_sentences`` are about running text: see ``Texts``; ``train_history``: see ``canonical``.

    Every record is checked before anything else happens; under ``streaming``, when it is reached. Files are read a record
    at a time (but for JSON lists) into a table on disk, which is cached by the hash of their content.

    Raises:
        UserError: the path or the record that cannot be used, and what to do about it.
    """
    mapping, texts = tuple((columns or {}).items()), (documents, max_sentences)
    files = local_files(path)
    if files is not None:
        digest = digest_of(files, contents=not streaming)
        rows: Callable = _file_rows
        names = [
            str(file) for file in files
        ]  # a list would be read a file at a time, each from a count of its own
        source: dict[str, Any] = {
            "files": names if max_sentences is None else tuple(names),
            "digest": f"{RECORDS_VERSION} {digest}",
            "whole_lists": not streaming,
        }
    else:
        rows, source = (
            _hub_rows,
            {"data": _from_hub(str(path), cache_dir, streaming), "name": str(path)},
        )
    source |= {"columns": mapping, "texts": texts, "train_history": train_history}
    first = next(rows(**source, form=None), None)
    if first is None:
        raise UserError(f"{path}: there is no record in it; give a file with at least one")
    source |= {"form": form_of(first)}
    features = FORMS[form_of(first)]
    if streaming:
        return IterableDataset.from_generator(rows, gen_kwargs=source, features=features)
    return table(rows, source, features, cache_dir)


def local_files(path: str | Path) -> list[Path] | None:
    """The files that a path names, None for the name of a hub set. Raises UserError for a path that leads nowhere."""
    place = Path(path).expanduser()
    if not str(path).strip():
        raise UserError(
            "data without a name, as of a variable that is not set; give a file, a folder or a hub name"
        )
    if exists(place) or kind_of_file(place) in FILE_KINDS or str(path).startswith((".", "/", "~")):
        return list_data_files(place)
    return None


def several_files(path: str | Path) -> list[str]:
    """A line that names the files of a source, where it has several."""
    files = local_files(path) or []
    names = (
        listed(file.relative_to(Path(path).expanduser()) for file in files)
        if len(files) > 1
        else ""
    )
    return [f"{path}: {len(files)} files: {names}"] if names else []


def _file_rows(
    files: Sequence[str],
    digest: str,
    whole_lists: bool,
    columns: Any,
    texts: tuple,
    train_history: bool,
    form: str | None,
) -> Iterator[Record]:
    """The generator behind the cached table. ``digest`` makes changed files another table; the files are its shards."""
    running = Texts(*texts)
    for file in map(Path, files):
        records = _of_one_form(read_file(file, whole_lists), dict(columns), train_history, form)
        for record in running.documents(records, in_lines=kind_of_file(file) == TEXT_FILE):
            form = form or form_of(record)
            yield record


def _from_hub(name: str, cache_dir: str | None, streaming: bool) -> Dataset | IterableDataset:
    path, _, config = name.partition(":")
    try:
        with quiet_hub():
            data = load_dataset(
                path,
                *([config] if config else []),
                split="train",
                cache_dir=cache_dir,
                streaming=streaming,
            )
    except (
        Exception
    ) as error:  # the hub raises many kinds of errors: not found, no network, gated, a bad name
        raise UserError(
            f"{name}: no such file, and the hub did not give it ({first_line(error)})"
        ) from None
    wanted = (data.info.splits or {}).get("train")
    if (
        isinstance(data, Dataset)
        and wanted is not None
        and wanted.num_examples not in (0, len(data))
    ):
        raise UserError(
            f"{name}: its copy in the cache has {len(data):,} of {wanted.num_examples:,} records; remove it there, or name "
            "another folder with --cache_dir"
        )
    return data


def _hub_rows(
    data: Dataset | IterableDataset,
    name: str,
    columns: Any,
    texts: tuple,
    train_history: bool,
    form: str | None,
) -> Iterator[Record]:
    batches = data.with_format("arrow").iter(
        batch_size=1000
    )  # as it stands: datasets would open files that it names
    rows = enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    values = ((f"{name}:record {number}", without_nulls(row)) for number, row in rows)
    records = _of_one_form(values, dict(columns), train_history, form)
    yield from Texts(*texts).documents(records, in_lines=False)


def _of_one_form(
    values: Iterator[Placed], columns: dict[str, str], train_history: bool, form: str | None
) -> Iterator[Record]:
    """The records. Raises UserError at one that is not of the ``form``, by default the first one's."""
    for where, value in values:
        record = parse_record(value, where, columns, train_history=train_history)
        form = form or form_of(record)
        if form_of(record) != form:
            raise UserError(
                f"{where}: a record of the form {form_of(record)} after {form}: give them as two sources"
            )
        yield record
