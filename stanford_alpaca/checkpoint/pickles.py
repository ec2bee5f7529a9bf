"""Reads the pickles that engines write without running code from them.

It uses PyTorch's restricted unpickler, with stand-ins for DeepSpeed's few classes.
"""

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
    """Stands in for an object of DeepSpeed's bookkeeping, and drops its contents."""

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
    """Returns the contents of a file of an engine or the Trainer.

    Tensors stay on disk until they are used.

    Raises:
        UserError: the file is broken, or holds more than numbers, strings, tensors and known
            bookkeeping.
    """
    try:
        with safe_globals(bookkeeping), safe_random_states():
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # PyTorch's message advises to trust the file
        raise UserError(f"{file}: holds more than a checkpoint does, or is broken") from None
    except Exception as error:  # no such file, or not a zip archive
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None


def restrict_deepspeed() -> None:
    """Makes DeepSpeed read its checkpoints with ``load``, from now on.

    By itself DeepSpeed unpickles whatever a file names. ``load`` allows only DeepSpeed's few
    own classes besides data.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    places = [name.rpartition(".") for name in DEEPSPEEDS]
    classes = [getattr(importlib.import_module(module), name) for module, _, name in places]
    TorchCheckpointEngine.load = lambda self, path, map_location=None: load(Path(path), classes)


def refuse_code(checkpoint: Path) -> None:
    """Raises UserError if any file that might be unpickled names code that should not run."""
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix in SUFFIXES:
            load(file)
        elif file.name == ".metadata":
            fsdp.Reader(file.parent).read_metadata()
