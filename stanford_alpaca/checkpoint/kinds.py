"""Which engine wrote a checkpoint, and which run can go on from it."""

from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from stanford_alpaca.checkpoint import fsdp, zero
from stanford_alpaca.errors import UserError

PLAIN, FSDP, ZERO = "plain", "fsdp", "zero"
EXPORT = "python -m stanford_alpaca.checkpoint export {} OUT makes a model of it that any run can start from"


def kind_of(checkpoint: Path) -> str:
    """What a checkpoint's weights are: plain Hugging Face or peft (one process, DDP), the shards of FSDP2, or those of ZeRO.

    Raises:
        UserError: no checkpoint.
    """
    if (checkpoint / fsdp.MODEL).is_dir():
        return FSDP
    if (checkpoint / "latest").is_file():
        return ZERO
    if any((checkpoint / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)):
        return PLAIN
    raise UserError(f"{checkpoint}: no weights of a checkpoint; give a folder checkpoint-N of a run")


def check_resumable(checkpoint: Path, engine: str, world_size: int, stage_3: bool = False) -> None:
    """Raises UserError unless a run with this engine (``PLAIN`` without shards) and these processes can go on.

    FSDP2's shards fit any number of processes, and one without FSDP too. ZeRO's fit the same number under the same stage.
    """
    kind, way_out = kind_of(checkpoint), EXPORT.format(checkpoint)
    optimizer = {PLAIN: OPTIMIZER_NAME, FSDP: fsdp.OPTIMIZER}.get(kind)
    if optimizer is not None and not (checkpoint / optimizer).exists():
        raise UserError(f"{checkpoint}: has no {optimizer} (--save_only_model?), nobody can go on from it; {way_out}")
    if kind == ZERO and engine == ZERO:
        shards = len(zero.shards_of(checkpoint))
        if shards != world_size:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: ZeRO goes on with as many processes as wrote it, {shards}, "
                f"not {world_size}; {way_out}"
            )
        if zero.is_stage_3(checkpoint) != stage_3:
            raise UserError(f"--resume_from_checkpoint {checkpoint}: written by another stage of ZeRO; {way_out}")
    elif kind != engine and (kind, engine) != (FSDP, PLAIN):
        names = {PLAIN: "a run without shards", FSDP: "FSDP", ZERO: "ZeRO"}
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {names[kind]} wrote it, {names[engine]} cannot go on; {way_out}"
        )
