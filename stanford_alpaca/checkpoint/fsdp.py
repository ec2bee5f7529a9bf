"""Reads the shards that FSDP2 saves (torch.distributed.checkpoint).

Any number of ranks can read them, and so can one process without a process group. PyTorch reads
their metadata and small values with pickle, which runs whatever code the file names. Here both pass
an allow-list first.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from stanford_alpaca.checkpoint.shapes import Form, check_shapes, tensor_form
from stanford_alpaca.errors import ResumeError, UserError, first_line

MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate's folder names
# accelerate saves state dicts with the same option: no device holds a second copy
OFFLOADED = StateDictOptions(cpu_offload=True)
METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *(
        (METADATA, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "TensorProperties",
        )
    ),
    *(
        (METADATA, name)
        for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the dataclasses that describe a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 names it
        if (module, name) in ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


class Reader(dcp.FileSystemReader):
    """Reads a folder of shards.

    Raises:
        UserError: the metadata is missing or broken, or holds anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        except Exception as error:  # a broken pickle may raise anything
            raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{file}: not the metadata of a checkpoint")
        for info in (metadata.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise UserError(
                    f"{file}: names {info.relative_path}, which is outside the checkpoint"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """Refuses values other than numbers, strings and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError:  # PyTorch's message advises to trust the file
            raise ValueError(
                f"{read_item.dest_index.fqn} holds more than numbers, words and tensors"
            ) from None
        value.seek(0)
        super().load_bytes(read_item, value)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Returns all weights of a checkpoint, unsharded, on the CPU of this process alone."""
    metadata = Reader(checkpoint / MODEL).read_metadata()
    state: dict[str, Tensor] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            state[key.removeprefix("model.")] = torch.empty(
                entry.size, dtype=entry.properties.dtype
            )
    _read({"model": state}, checkpoint / MODEL, no_dist=True)
    return state


def restore_model(model: nn.Module, checkpoint: Path) -> None:
    """Loads the weights into a sharded or whole model, on all ranks.

    Collectives: those of ``torch.distributed.checkpoint``.
    """
    # accelerate saves the adapter alone, under peft's names. The tensors of peft's state dict are
    # the model's own, so reading into them is enough.
    if isinstance(model, PeftModel):
        return _read({"model": get_peft_model_state_dict(model)}, checkpoint / MODEL)
    state = {"model": get_model_state_dict(model, options=OFFLOADED)}
    _read(state, checkpoint / MODEL)
    set_model_state_dict(model, state["model"], options=OFFLOADED)


def load_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Loads the optimizer state on all ranks, as ``restore_model`` does the weights."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=OFFLOADED)}
    _read(state, checkpoint / OPTIMIZER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=OFFLOADED)


def _read(state: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    flat, _ = flatten_state_dict(state)
    saved = Reader(folder).read_metadata().state_dict_metadata
    nothing: Form = ([], torch.uint8)  # stands for a value that is not a tensor
    check_shapes(
        folder,
        {
            k: (list(e.size), e.properties.dtype)
            if isinstance(e, TensorStorageMetadata)
            else nothing
            for k, e in saved.items()
        },
        {
            key: tensor_form(value) if isinstance(value, Tensor) else nothing
            for key, value in flat.items()
        },
    )
    try:
        with warnings.catch_warnings():  # one process is meant to read alone
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(state, storage_reader=Reader(folder), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ResumeError(f"{folder}: cannot be read ({first_line(reason)})") from None
