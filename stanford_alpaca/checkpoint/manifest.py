"""``manifest.json``: every file of a checkpoint by size and SHA-256, and the run it belongs to. Written last, read first."""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from stanford_alpaca.errors import ResumeError, first_line

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
READ_BY_LOADERS = {
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".pkl",
    ".distcp",
    ".metadata",
}  # not to be added by anybody
THREADS = 8


def file_sha256(file: Path, flush: bool = False) -> str:
    """The digest of a file; with ``flush``, which also waits until its content is on the disk."""
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
    """What a manifest says of these files; several are read at a time."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda name: file_sha256(folder / name, flush), names)
        return {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }


def list_saved(folder: Path) -> list[str]:
    """All files below a folder but its manifest, relative to it, in the same order everywhere."""
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in found if name != MANIFEST_FILE)


def write(folder: Path, files: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Makes a folder of files that are on the disk a checkpoint: the manifest appears whole or not at all."""
    content = {"version": MANIFEST_VERSION, **about, "files": files}
    content["sum"] = _sum(content)
    write_whole(folder / MANIFEST_FILE, json.dumps(content, indent=1))
    flush_folders(folder)


def write_whole(file: Path, text: str) -> None:
    """A file that is on the disk as a whole, or as it was before."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
    flush_folder(file.parent)


def flush_folders(folder: Path) -> None:
    """Waits until the names of all files below a folder are on the disk."""
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush_folder(place)


def flush_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> dict[str, Any]:
    """A folder's manifest. Raises ResumeError if it is not there, is damaged, or points out of the folder."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
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
    """What is wrong with a checkpoint, a line for each file; without ``contents`` sizes alone are compared."""
    try:
        files = read(folder)["files"]
    except ResumeError as error:
        return [str(error)]
    found = compare(folder, files, contents)
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


def compare(folder: Path, files: dict[str, dict[str, Any]], contents: bool = True) -> list[str]:
    """What of these files is not as a manifest has it, a line for each; without ``contents`` sizes alone are compared."""
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
    except OSError as error:  # a disk that fails, a name too long
        return [*found, f"cannot be read ({first_line(error)})"]
    return found + [
        f"{name}: its content has changed" for name in same_size if now[name] != files[name]
    ]


def summary(folder: Path, contents: bool = True) -> str:
    """The first of its ``problems`` on a line, or nothing."""
    found = problems(folder, contents)
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def is_record(run: Any) -> bool:
    """Whether this has the types of a run's record: flags by name, with lists of paths, and what it was made with."""
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
    """Bytes of all files that the manifest names. Raises ResumeError as ``read``."""
    return sum(entry["bytes"] for entry in read(folder)["files"].values())


def checkpoints(output: Path) -> list[Path]:
    """The folders ``checkpoint-N`` in an output folder, the newest (the greatest N) first; good or not."""
    found = [
        folder
        for folder in output.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", folder.name)
    ]
    return sorted((folder for folder in found if folder.is_dir()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """N of a folder checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_loaded(name: str) -> bool:
    """Whether somebody who loads the folder might read this file; a finished one's checkpoints are by themselves."""
    path = Path(name)
    return not name.startswith(("checkpoint-", ".")) and (
        path.suffix in READ_BY_LOADERS or path.name in READ_BY_LOADERS
    )


def _sum(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "sum"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
