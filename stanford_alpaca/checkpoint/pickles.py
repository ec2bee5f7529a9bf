"""Reads what engines pickle without running it: torch's restricted unpickler, with stand-ins for DeepSpeed's few classes."""

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals
from transformers.trainer_pt_utils import safe_globals as safe_random_states

from stanford_alpaca.checkpoint import fsdp
from stanford_alpaca.errors import UserError, first_line

SUFFIXES = (".pt", ".pth", ".bin", ".pkl")


class _Inert:
    """Stands in for an object of DeepSpeed's bookkeeping: takes what it was made of, and drops it."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


DEEPSPEEDS = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
STAND_INS: list[Callable | tuple[Callable, str]] = [(_Inert, name) for name in DEEPSPEEDS]


def load(
    file: Path, bookkeeping: list[Callable | tuple[Callable, str]] = STAND_INS
) -> dict[str, Any]:
    """What a file of an engine or the Trainer holds; tensors stay on the disk until they are used.

    Raises:
        UserError: it holds anything but numbers, words, tensors and known bookkeeping, or is broken.
    """
    try:
        with safe_globals(bookkeeping), safe_random_states():
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # its own message advises to trust the file
        raise UserError(f"{file}: holds more than a checkpoint does, or is broken") from None
    except Exception as error:  # not there, no zip
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None


def restrict_deepspeed() -> None:
    """From now on DeepSpeed, which unpickles whatever a file says, reads its checkpoints by ``load``, with its own classes."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    places = [name.rpartition(".") for name in DEEPSPEEDS]
    classes = [getattr(importlib.import_module(module), name) for module, _, name in places]
    TorchCheckpointEngine.load = lambda self, path, map_location=None: load(Path(path), classes)


def refuse_code(checkpoint: Path) -> None:
    """Raises UserError if any file that somebody may unpickle holds what should not be run."""
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix in SUFFIXES:
            load(file)
        elif file.name == ".metadata":
            fsdp.Reader(file.parent).read_metadata()
