"""Identifies a model by its files.

It also tells whether a model is still what was saved, or what an adapter was trained on.
"""

import json
import re
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.run_file import read_run
from stanford_alpaca.console import say
from stanford_alpaca.errors import ResumeError, UserError

# files with the weights, and their configuration
WEIGHTS_FILE = re.compile(r"(adapter_)?model[-\w]*\.safetensors|model.*\.index\.json|config\.json")
# weights, code, configurations and tokenizers; not what runs and evaluations leave beside them
MODEL_FILE = re.compile(
    WEIGHTS_FILE.pattern + r"|.*\.(model|jinja|py)|adapter_config\.json|generation_config\.json"
    r"|tokenizer(_config)?\.json"
    r"|(vocab|special_tokens_map|added_tokens)\.(json|txt)|merges\.txt"
)
# users may change these files of a finished model, and it stays the same model
TUNABLE = ("generation_config.json", "chat_template.jinja")
# in a run's record, beside the whole model: the identity of the weights that an adapter depends on
BASE = "base weights"
READ_WHOLE = 2 * 2**30  # bytes; the contents of larger models are compared only on request


def identify_model(name: str, cache_dir: str | None = None, *, weights: bool = False) -> str:
    """Returns what identifies a model: a sha256 of its files, or its hub name and commit.

    The files are its weights, code, configurations and tokenizer.

    Args:
        weights: looks only at the weights and their configuration.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        # its path contains the commit; no weights are downloaded
        config = cached_file(name, "config.json", cache_dir=cache_dir)
        return f"hub:{name}@{extract_commit_hash(config, None)}"
    files = sorted(
        file.name for file in folder.iterdir() if MODEL_FILE.fullmatch(file.name) and file.is_file()
    )
    stats = [(folder / file).stat() for file in files]
    entries = _entries(
        folder, tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    )
    about = {
        file: entry
        for file, entry in entries.items()
        if not weights or WEIGHTS_FILE.fullmatch(file)
    }
    return f"sha256:{sha256(json.dumps(about).encode()).hexdigest()}"


@lru_cache(maxsize=16)  # several models may share a base
def _entries(folder: Path, files: tuple[str, ...], stats: tuple) -> dict[str, dict[str, Any]]:
    return manifest.entries_of(folder, files)


def run_of(folder: Path) -> dict[str, Any]:
    """Returns the record of the run that saved a folder, or {} if none of ours did.

    Raises:
        ResumeError: the manifest is damaged.
    """
    if (folder / manifest.MANIFEST_FILE).exists():
        return manifest.read(folder)["run"]
    return read_run(folder) or {}


def base_has_changed(
    adapter: str, base: str, then: str | None, cache_dir: str | None = None
) -> str:
    """Says that a base does not have the weights that its adapter was trained on.

    Args:
        then: what ``identify_model`` returned for the weights when the adapter was trained.

    Returns:
        A message, or an empty string if the base has those weights or this cannot be known.
    """
    now = identify_model(base, cache_dir, weights=True) if then else None
    # a folder cannot be compared with a hub name
    if now == then or str(now).partition(":")[0] != str(then).partition(":")[0]:
        return ""
    return (
        f"{base}: not the base that {adapter} was trained on, or it has changed since "
        f"({then} then, {now} now)"
    )


def check_unchanged(folder: Path, verify: bool = False) -> None:
    """Raises UserError for a folder whose files are not what its manifest says.

    A folder without a manifest is accepted as it is.

    Args:
        verify: compares contents however large they are. Without it, only sizes are compared above
            READ_WHOLE bytes, and a line says so.
    """
    if not (folder / manifest.MANIFEST_FILE).is_file():
        return
    try:
        files = manifest.read(folder)["files"]
    except ResumeError as error:
        raise UserError(f"{folder}: {error}; give another copy") from None
    names = [name for name in files if MODEL_FILE.fullmatch(name) and name not in TUNABLE]
    size = sum(files[name]["bytes"] for name in names)
    whole = verify or size <= READ_WHOLE
    wrong = manifest.wrong_files(folder, {name: files[name] for name in names}, contents=whole)
    if wrong:
        raise UserError(
            f"{folder}: not what was saved ({wrong[0]}); give another copy, "
            f"or delete {manifest.MANIFEST_FILE} if the change is yours"
        )
    if not whole:
        say(
            f"{folder}: {size / 2**30:.1f} GiB, of which sizes alone are compared with "
            f"{manifest.MANIFEST_FILE}; --verify reads them"
        )
