"""Loads records of one form from a file, a folder or the hub.

The result is a ``datasets.Dataset`` with the columns of a form of ``FORMS``.
"""

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
    check_unchanged,
    digest_of,
    exists,
    kind_of_file,
    list_data_files,
    read_file,
    remember,
    without_nulls,
)
from stanford_alpaca.data.records import FORMS, Record, form_of, parse_record
from stanford_alpaca.errors import UserError, first_line, listed, nearest

# names besides those of FORMS that --columns may map
OTHERS = ("conversations", "history", "tools", "weight", "train", "role", "content")
# raise it when the same file gives other records, so that old caches are not used
RECORDS_VERSION = 4


def parse_columns(texts: list[str]) -> dict[str, str]:
    """Parses the values of --columns into a mapping from our names to the data's.

    A value is like ``instruction=question``, or several of them with commas. Raises UserError for
    other values and for names that are not ours.
    """
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
    """Parses --columns for a command whose parser passes only the first of its values.

    Returns the mapping, and the words without the other values.
    """
    if flag is None:
        return {}, words
    others = [word for word in words if "=" in word and not exists(Path(word))]
    return parse_columns([flag, *others]), [word for word in words if word not in others]


def check_columns(paths: list[str], columns: Mapping[str, str]) -> None:
    """Raises UserError for a name in --columns that is in the first record of no source.

    Checks nothing if a source is a hub set.
    """
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
                f"--columns {ours}={theirs}: there is no {theirs!r}; "
                f"the first record has {listed(seen)}"
            )


def load_records(
    path: str | Path,
    cache_dir: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,  # our name -> the name in the file
    streaming: bool = False,
    documents: str | None = None,
    max_sentences: int | None = None,
    detokenize: bool = False,
    train_history: bool = False,
) -> Dataset | IterableDataset:
    """Reads records from a file, a folder of files, or the train split of a hub set.

    A hub set is named NAME or NAME:CONFIG. All records must have one form. Every record is checked
    before anything else happens; with ``streaming``, when it is reached. Files are read one record
    at a time into a table on disk, which is cached by the hash of their content. Only a JSON list
    is read as a whole.

    Args:
        documents, max_sentences, detokenize: for running text, see ``Texts``.
        train_history: see ``parse_record``.

    Raises:
        UserError: the path or a record cannot be used; the message says what to do about it.
    """
    mapping, texts = tuple((columns or {}).items()), (documents, max_sentences, detokenize)
    files = local_files(path)
    if files is not None:
        remember(files)
        digest = digest_of(files, contents=not streaming)
        rows: Callable = _file_rows
        # datasets calls the generator once for each file of a list. max_sentences is a limit on
        # all files together, so it needs a tuple, which is read in a single call.
        names = [str(file) for file in files]
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
    """Returns the files that a path names, or None for the name of a hub set.

    Raises:
        UserError: the path is empty or leads nowhere.
    """
    place = Path(path).expanduser()
    if not str(path).strip():
        raise UserError(
            "data without a name, as of a variable that is not set; "
            "give a file, a folder or a hub name"
        )
    if exists(place) or kind_of_file(place) in FILE_KINDS or str(path).startswith((".", "/", "~")):
        return list_data_files(place)
    return None


def several_files(path: str | Path) -> list[str]:
    """Returns a line that names the files of a source, or none if it has only one."""
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
    """Yields the records of the cached table.

    Args:
        files: the shards of the table.
        digest: is not read; it gives changed files another cache.
    """
    running = Texts(*texts)
    for file in map(Path, files):
        records = _of_one_form(read_file(file, whole_lists), dict(columns), train_history, form)
        for record in running.documents(records, in_lines=kind_of_file(file) == TEXT_FILE):
            form = form or form_of(record)
            yield record
        check_unchanged(file)


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
    # the hub raises many kinds of errors: not found, no network, gated, a bad name
    except Exception as error:
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
            f"{name}: its copy in the cache has {len(data):,} of {wanted.num_examples:,} records; "
            "remove it there, or name another folder with --cache_dir"
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
    # without this format, datasets would open the files (such as images) that a record names
    batches = data.with_format("arrow").iter(batch_size=1000)
    rows = enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    values = ((f"{name}:record {number}", without_nulls(row)) for number, row in rows)
    records = _of_one_form(values, dict(columns), train_history, form)
    yield from Texts(*texts).documents(records, in_lines=False)


def _of_one_form(
    values: Iterator[Placed], columns: dict[str, str], train_history: bool, form: str | None
) -> Iterator[Record]:
    """Yields the records. Raises UserError at one of another form.

    Args:
        form: the form that all must have; None for that of the first record.
    """
    for where, value in values:
        record = parse_record(value, where, columns, train_history=train_history)
        form = form or form_of(record)
        if form_of(record) != form:
            raise UserError(
                f"{where}: a record of the form {form_of(record)} after {form}: "
                "give them as two sources"
            )
        yield record
