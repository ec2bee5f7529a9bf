"""Reads the float32 master weights of a DeepSpeed checkpoint, on a machine without DeepSpeed.

ZeRO keeps them with the optimizer state. A parameter's place in the flat shards follows DeepSpeed's
own zero_to_fp32.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stanford_alpaca.checkpoint import pickles
from stanford_alpaca.checkpoint.shapes import check_shapes
from stanford_alpaca.errors import UserError, first_line


def shards_of(checkpoint: Path) -> list[Path]:
    """Returns the files with the optimizer's shards, one per rank, in the order of the ranks."""
    found = _folder(checkpoint).glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    return sorted(
        found, key=lambda file: int(file.name.rpartition("zero_pp_rank_")[2].partition("_")[0])
    )


def is_stage_3(checkpoint: Path) -> bool:
    """Returns whether the parameters are sharded as well."""
    return not (_folder(checkpoint) / "mp_rank_00_model_states.pt").exists()


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Returns all weights of a checkpoint, unsharded, on the CPU.

    The rest of the optimizer state stays on disk.

    Raises:
        UserError: shards are missing, broken or of another kind.
    """
    stage_3, shards = is_stage_3(checkpoint), shards_of(checkpoint)
    try:
        described = _describe(checkpoint)
        states = [pickles.load(file)["optimizer_state_dict"] for file in shards]
        count = states[0]["partition_count"] if states else 0
        ranks = max(count) if isinstance(count, list) else count
        if not states or ranks != len(states):
            raise UserError(
                f"{_folder(checkpoint)}: {len(states)} of {ranks or 'the'} "
                "optimizer shards are there"
            )
        weights = {key: described["module"][key].float() for key in described["buffer_names"]}
        return weights | (_of_stage_3 if stage_3 else _of_stage_2)(
            described["param_shapes"], states
        )
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{_folder(checkpoint)}: not the shards of ZeRO 1, 2 or 3 ({first_line(error)})"
        ) from None


def check_parameters(checkpoint: Path, model: nn.Module) -> None:
    """Raises ResumeError unless saved and trained parameters have the same names and shapes."""
    groups = _describe(checkpoint)["param_shapes"]
    saved = {
        name: (list(shape), torch.float32) for shapes in groups for name, shape in shapes.items()
    }
    trained = {
        name: (list(p.shape), torch.float32)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    check_shapes(checkpoint, saved, trained)


def _describe(checkpoint: Path) -> dict[str, Any]:
    """Reads the file that describes the parameters: their names, shapes and more."""
    stage_3 = is_stage_3(checkpoint)
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage_3 else "mp_rank_00_model_states.pt"
    return pickles.load(_folder(checkpoint) / name)


def _of_stage_2(groups: list[dict[str, torch.Size]], states: list[dict]) -> dict[str, Tensor]:
    """Puts together the weights of stages 1 and 2.

    Each group of parameters is one flat vector, cut into one piece per rank.
    """
    weights = {}
    for i, shapes in enumerate(groups):
        pieces = [state["single_partition_of_fp32_groups"][i] for state in states]
        paddings = states[0].get("param_alignment_paddings")
        gaps = paddings[i] if paddings else [0] * len(shapes)
        offset = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            weights[name] = _span(pieces, offset, shape.numel()).view(shape)
            offset += shape.numel() + gap
    return weights


def _of_stage_3(groups: list[dict[str, torch.Size]], states: list[dict]) -> dict[str, Tensor]:
    """Puts together the weights of stage 3.

    Each parameter is cut by itself, padded to a multiple of the number of ranks.
    """
    weights, offset = {}, 0
    for name, shape in (item for shapes in groups for item in shapes.items()):
        length = math.ceil(shape.numel() / len(states))
        parts = [_span(state["fp32_flat_groups"], offset, length) for state in states]
        weights[name] = torch.cat(parts)[: shape.numel()].view(shape)
        offset += length
    return weights


def _span(pieces: Sequence[Tensor], offset: int, length: int) -> Tensor:
    """Returns a copy of ``length`` numbers from ``offset`` on, out of consecutive pieces."""
    found, start = [], 0
    for piece in pieces:
        first, last = max(offset - start, 0), min(offset + length - start, len(piece))
        if first < last:
            found.append(piece[first:last])
        start += len(piece)
    span = torch.cat(found) if found else torch.empty(0)
    if len(span) != length:
        raise UserError(
            f"the optimizer shards hold {start} numbers, but a parameter ends at {offset + length}"
        )
    return span


def _folder(checkpoint: Path) -> Path:
    """Returns the folder that DeepSpeed's file ``latest`` names."""
    latest = checkpoint / "latest"
    name = latest.read_text().strip() if latest.is_file() else ""
    if name in ("", "..") or Path(name).name != name or not (checkpoint / name).is_dir():
        raise UserError(f"{latest}: does not name a folder beside it")
    return checkpoint / name
