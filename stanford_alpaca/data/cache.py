"""Caches tables of records on disk. A table whose files differ from its check file is rebuilt."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import xxhash
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from filelock import FileLock

from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.checkpoint.manifest import write_whole
from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError, first_line

CHECK = "{}.check.json"  # sizes and digests of a table's files


def table(
    rows: Callable[..., Iterator[dict]],
    source: dict[str, Any],
    features: Features,
    cache_dir: str | None,
) -> Dataset:
    """Writes what a generator yields to a table on disk, once for each ``source``.

    Raises:
        UserError: the generator raises it, or the cache cannot be used.
    """
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    place = root / f"stanford_alpaca-{Hasher.hash([rows, source, features])}"

    def make() -> Dataset:
        return Dataset.from_generator(
            rows, gen_kwargs=source, cache_dir=str(place), features=features
        )

    def files() -> list[Path]:
        return sorted(
            file
            for name in ("generator-*.arrow", "dataset_info.json")
            for file in place.rglob(name)
        )

    with _one_line_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        return _kept(make, files, place / CHECK.format("table"), place)


def mapped(records: Dataset, function: Callable[[dict], dict], key: str, **options: Any) -> Dataset:
    """Runs ``records.map`` in batches and caches the result beside the table of the records.

    Its name there is a hash of the records' fingerprint and ``key``. Records in memory are mapped
    without a cache.

    Raises:
        UserError: the cache cannot be used.
    """
    fingerprint = sha256(f"{records._fingerprint}\n{key}".encode()).hexdigest()[:32]
    options |= {
        "batched": True,
        "remove_columns": records.column_names,
        "new_fingerprint": fingerprint,
        "desc": "Tokenizing",
    }
    if not records.cache_files:  # in memory
        return records.map(function, **options)
    place = Path(records.cache_files[0]["filename"]).parent
    name = f"tokenized-{fingerprint}"

    def make() -> Dataset:
        return records.map(
            function,
            cache_file_name=str(place / f"{name}.arrow"),
            load_from_cache_file=True,
            **options,
        )

    with _one_line_errors(place):
        return _kept(make, lambda: sorted(place.glob(f"{name}*.arrow")), place / CHECK.format(name))


def _kept(
    make: Callable[[], Dataset],
    files: Callable[[], list[Path]],
    check: Path,
    folder: Path | None = None,
) -> Dataset:
    """Returns what ``make`` reads from its files, or makes anew if they differ from the check.

    In the latter case the files (or the whole folder) are removed first. Only one process works
    at a time. Another one waits for its result.
    """
    lock = (
        folder.with_name(f"{folder.name}.lock")
        if folder is not None
        else check.with_suffix(".lock")
    )
    with FileLock(lock):
        found = files()
        exists = folder.exists() if folder is not None else bool(found) or check.exists()
        if exists and _read(check) != _checked(found):
            state = "is not what was written there" if check.exists() else "was not finished"
            say(f"{check.parent}: a cached table {state}; it is made again")
            if folder is not None and folder.is_dir():
                shutil.rmtree(folder)
            elif folder is not None:
                folder.unlink()
            for file in [*found, check] if folder is None else []:
                file.unlink(missing_ok=True)
        made = make()
        if not check.exists():
            write_whole(check, json.dumps(_checked(files()), indent=1))
        return made


def _checked(files: list[Path]) -> dict[str, list]:
    """Returns the size and the digest of each file.

    The digest is xxh3, which is fast, because every file is read at every start. It protects
    against damage, not against forgery.
    """
    return {file.name: [file.stat().st_size, _digest(file)] for file in files}


def _digest(file: Path) -> str:
    total = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            total.update(block)
    return total.hexdigest()


def _read(check: Path) -> Any:
    try:
        return read_json(check)
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _one_line_errors(root: Path) -> Iterator[None]:
    """Passes on the UserError of the generator, and raises UserError if the file system fails."""
    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{root}: the cache of data cannot be used ({first_line(cause)}); name another folder: "
            "--cache_dir FOLDER, or HF_DATASETS_CACHE=FOLDER in the environment"
        ) from None
