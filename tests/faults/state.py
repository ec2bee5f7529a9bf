"""Digests of a checkpoint's values, so that two checkpoints can be compared.

Files of equal values may differ in their bytes.
"""

import json
import threading
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stanford_alpaca.checkpoint import fsdp, manifest, pickles

# What torch's restricted unpickler allows is set for the whole process, and cases run in threads.
ALLOWING = threading.Lock()
CLOCK = ("supervised_tokens_per_s", "runtime", "per_second", "train_loss")  # differ in every run
ABOUT_PLACES = ("best_model_checkpoint", "train_batch_size")


def values(folder: Path) -> dict[str, str]:
    """Returns the digest of every value in a checkpoint, by ``FILE:NAME``.

    Times and the folder's own name are left out.
    """
    found: dict[str, str] = {}
    for name in manifest.list_saved(folder):
        for key, value in _walk(_read(folder / name)):
            found[f"{name}:{key}"] = value
    for part in (fsdp.MODEL, fsdp.OPTIMIZER):
        if (folder / part).is_dir():
            found |= {f"{part}:{key}": value for key, value in _walk(read_shards(folder / part))}
    return found


def differences(one: Path, two: Path) -> list[str]:
    """Returns the names of the values in which two checkpoints differ."""
    a, b = values(one), values(two)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _read(file: Path) -> Any:
    if file.suffix in (".distcp", ".metadata") or file.name == ".metadata":
        return {}  # read_shards reads all of these at once
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth", ".bin"):
        with ALLOWING:
            return pickles.load(file)
    if file.name == "trainer_state.json":
        state = json.loads(file.read_text())
        # Evaluations are left out, because a signal may interrupt one.
        steps = [entry for entry in state.pop("log_history") if "loss" in entry]
        logs = [{k: v for k, v in entry.items() if not k.endswith(CLOCK)} for entry in steps]
        return {k: v for k, v in state.items() if k not in ABOUT_PLACES} | {"log_history": logs}
    if file.suffix == ".json":
        return json.loads(file.read_text())
    return file.read_bytes()


def read_shards(folder: Path) -> dict[str, Any]:
    metadata = fsdp.Reader(folder).read_metadata()
    state: dict[str, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        tensor = isinstance(entry, TensorStorageMetadata)
        state[key] = torch.empty(entry.size, dtype=entry.properties.dtype) if tensor else None
    with warnings.catch_warnings():  # one process alone reads
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(state, storage_reader=fsdp.Reader(folder), planner=fsdp._Planner(), no_dist=True)
    return state


def _walk(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{place}/{key}")
    elif isinstance(value, list | tuple) and any(
        isinstance(item, dict | list | tuple | torch.Tensor) for item in value
    ):
        for number, item in enumerate(value):
            yield from _walk(item, f"{place}/{number}")
    elif isinstance(value, torch.Tensor):
        about = f"{value.dtype} {list(value.shape)} ".encode()
        data = (
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if value.numel()
            else b""
        )
        yield place, sha256(about + data).hexdigest()[:16]
    elif hasattr(value, "tobytes"):
        yield place, sha256(value.tobytes()).hexdigest()[:16]
    elif type(value) is pickles._Inert:  # DeepSpeed's bookkeeping
        yield place, type(value).__name__
    else:
        yield place, sha256(repr(value).encode()).hexdigest()[:16]
