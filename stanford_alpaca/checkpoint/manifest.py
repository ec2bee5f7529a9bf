"""``manifest.json``: the size and SHA-256 of a checkpoint's files, and the run it belongs to.

It is written last and read first.
"""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.errors import ResumeError, first_line

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
# endings of files that loaders read; nobody may add one that the manifest does not name
READ_BY_LOADERS = {".safetensors", ".pt", ".pth", ".bin", ".pkl", ".distcp", ".metadata"}
THREADS = 8


def file_sha256(file: Path, flush: bool = False) -> str:
    """Returns the SHA-256 of a file. With ``flush`` it also waits until the content is on disk."""
    total = sha256()
    with file.open("rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        while block := stream.read(2**22):
            total.update(block)
    return total.hexdigest()


def entries_of(
    folder: Path, names: Iterable[str], flush: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns what a manifest says of these files. Several are read at a time."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: file_sha256(folder / name, flush), names)
        return {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }


def list_saved(folder: Path) -> list[str]:
    """Lists the files below a folder, except its manifest, in the same order on every machine.

    The paths are relative to the folder.
    """
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in found if name != MANIFEST_FILE)


def write(folder: Path, files: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Makes a folder a checkpoint: writes its manifest, which appears whole or not at all.

    The files must be on disk already.
    """
    content = {"version": MANIFEST_VERSION, **about, "files": files}
    content["sum"] = _sum(content)
    write_whole(folder / MANIFEST_FILE, json.dumps(content, indent=1))
    flush_folders(folder)


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file to disk as a whole, or leaves it as it was. Text is written in UTF-8."""
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    flush_folder(file.parent)


def flush_folders(folder: Path) -> None:
    """Waits until the names of all files below a folder are on disk."""
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_folder(place)


def flush_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> dict[str, Any]:
    """Returns a folder's manifest.

    Raises:
        ResumeError: it is missing or damaged, or names a file outside the folder.
    """
    try:
        content = read_json(folder / MANIFEST_FILE)
        whole = content["version"] == MANIFEST_VERSION and content["sum"] == _sum(content)
        known = all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for entry in content["files"].values()
        )
        known &= (
            isinstance(content["step"], int)
            and isinstance(content.get("world_size", 1), int)
            and is_record(content.setdefault("run", {}))
        )
    except FileNotFoundError:
        raise ResumeError(
            f"{MANIFEST_FILE}: not there, so nothing says what the files should be"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResumeError(
            f"{MANIFEST_FILE}: cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from None
    if not whole or not known:
        raise ResumeError(f"{MANIFEST_FILE}: damaged, or of another version")
    for name in content["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ResumeError(f"{MANIFEST_FILE}: names {name}, which is outside the folder")
    return content


def problems(folder: Path, contents: bool = True) -> list[str]:
    """Returns what is wrong with a checkpoint, one line for each file.

    Besides differences from the manifest, these are symbolic links and files that loaders read but
    the manifest does not name. Without ``contents`` only sizes are compared.
    """
    try:
        files = read(folder)["files"]
    except ResumeError as error:
        return [str(error)]
    found = wrong_files(folder, files, contents)
    try:
        strange = [name for name in list_saved(folder) if name not in files and _is_loaded(name)]
        links = [
            path
            for path in folder.rglob("*")
            if path.is_symlink() and not path.name.startswith("checkpoint-")
        ]
    except OSError as error:
        return [*found, f"cannot be read ({first_line(error)})"]
    found += [f"{name}: was not saved with the others" for name in strange]
    return found + [f"{path.relative_to(folder)}: leads out of the folder" for path in links]


def wrong_files(folder: Path, files: dict[str, dict[str, Any]], contents: bool = True) -> list[str]:
    """Returns which of these files differ from their manifest entries, one line for each.

    Without ``contents`` only sizes are compared.
    """
    found, same_size = [], []
    try:
        for name, entry in files.items():
            file = folder / name
            if not file.is_file():
                found.append(f"{name}: not there")
            elif file.stat().st_size != entry["bytes"]:
                found.append(f"{name}: {file.stat().st_size:,} bytes, not {entry['bytes']:,}")
            else:
                same_size.append(name)
        now = entries_of(folder, same_size) if contents else files
    except OSError as error:  # a failing disk, or a name that is too long
        return [*found, f"cannot be read ({first_line(error)})"]
    return found + [
        f"{name}: its content has changed" for name in same_size if now[name] != files[name]
    ]


def summary(folder: Path, contents: bool = True) -> str:
    """Returns the first three ``problems`` of a checkpoint in one line, or an empty string."""
    found = problems(folder, contents)
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def is_record(run: Any) -> bool:
    """Returns whether this has the types of a run's record.

    A record holds the flags by name, with lists of paths, and what the run was made with.
    """
    if not isinstance(run, dict):
        return False
    made_with, paths = (
        run.get("made_with") or {},
        [run.get(name) or [] for name in ("data_path", "eval_path")],
    )
    return (
        isinstance(made_with, dict)
        and isinstance(made_with.get("data") or {}, dict)
        and all(
            isinstance(part, list) and all(isinstance(path, str) for path in part) for part in paths
        )
    )


def size(folder: Path) -> int:
    """Returns the bytes of all files in the manifest. Raises ResumeError as ``read`` does."""
    return sum(entry["bytes"] for entry in read(folder)["files"].values())


def checkpoints(output: Path) -> list[Path]:
    """Returns the folders ``checkpoint-N`` of an output folder, the newest (greatest N) first.

    They may be damaged.
    """
    found = [
        folder
        for folder in output.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", folder.name)
    ]
    return sorted((folder for folder in found if folder.is_dir()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Returns N of a folder checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_loaded(name: str) -> bool:
    """Returns whether loading the folder might read this file.

    The checkpoints inside a finished output folder do not count: they have their own manifests.
    """
    path = Path(name)
    return not name.startswith(("checkpoint-", ".")) and (
        path.suffix in READ_BY_LOADERS or path.name in READ_BY_LOADERS
    )


def _sum(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "sum"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
