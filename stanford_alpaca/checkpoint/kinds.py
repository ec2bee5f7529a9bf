"""Tells which engine wrote a checkpoint, and whether a run can resume from it."""

from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from stanford_alpaca.checkpoint import fsdp, zero
from stanford_alpaca.errors import UserError, first_line

PLAIN, FSDP, ZERO = "plain", "fsdp", "zero"
EXPORT = (
    "python -m stanford_alpaca.checkpoint export {} OUT makes a model of it "
    "that any run can start from"
)


def kind_of(checkpoint: Path) -> str:
    """Returns the kind of a checkpoint's weights: ``PLAIN``, ``FSDP`` or ``ZERO``.

    Plain weights are files of transformers or peft, which one process or DDP saves. The other two
    are the shards of FSDP2 and of ZeRO.

    Raises:
        UserError: there is no checkpoint.
    """
    if (checkpoint / fsdp.MODEL).is_dir():
        return FSDP
    if (checkpoint / "latest").is_file():
        return ZERO
    if any(
        (checkpoint / name).is_file()
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
    ):
        return PLAIN
    raise UserError(
        f"{checkpoint}: no weights of a checkpoint; give a folder checkpoint-N of a run"
    )


def check_resumable(checkpoint: Path, engine: str, world_size: int, stage_3: bool = False) -> None:
    """Raises UserError unless a run with this engine and number of processes can resume.

    ``engine`` is ``PLAIN`` for a run without shards. FSDP2's shards fit any number of processes,
    and a run without FSDP too. ZeRO's shards fit only as many processes as wrote them, and those of
    stage 3 fit only stage 3.
    """
    kind, way_out = kind_of(checkpoint), EXPORT.format(checkpoint)
    needed = {PLAIN: (OPTIMIZER_NAME, SCHEDULER_NAME), FSDP: (fsdp.OPTIMIZER, SCHEDULER_NAME)}.get(
        kind, ()
    )
    # ZeRO keeps both in its shards; reading those reports it if they are missing
    for name in needed:
        if not (checkpoint / name).exists():
            raise UserError(
                f"{checkpoint}: has no {name} (--save_only_model?), "
                f"nobody can go on from it; {way_out}"
            )
    if kind == ZERO and engine == ZERO:
        shards = len(zero.shards_of(checkpoint))
        if shards != world_size:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: ZeRO goes on with as many processes "
                f"as wrote it, {shards}, not {world_size}; {way_out}"
            )
        if zero.is_stage_3(checkpoint) != stage_3:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: written by another stage of ZeRO; "
                f"{way_out}"
            )
    elif kind != engine and (kind, engine) != (FSDP, PLAIN):
        names = {PLAIN: "a run without shards", FSDP: "FSDP", ZERO: "ZeRO"}
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {names[kind]} wrote it, "
            f"{names[engine]} cannot go on; {way_out}"
        )


def check_state(checkpoint: Path, step: int, ranks: int) -> None:
    """Raises UserError unless the Trainer's state and the random states are there.

    trainer_state.json must be the Trainer's and of this step. Each of the ranks needs a file with
    its random states.
    """
    file, usual = checkpoint / TRAINER_STATE_NAME, vars(TrainerState())
    try:
        state = TrainerState.load_from_json(str(file))
        right = all(
            _is_like(getattr(state, name), value)
            for name, value in usual.items()
            if value is not None
        )
        right = (
            right
            and state.global_step == step
            and isinstance(state.best_model_checkpoint, str | None)
        )
        right = right and all(isinstance(entry["step"], int) for entry in state.log_history)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    if not right:
        raise UserError(f"{file}: not what the Trainer writes at step {step}")
    for rank in range(ranks):
        name = "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint}: has no {name}, so a run would not go on as it was")


def _is_like(value: Any, usual: Any) -> bool:
    return isinstance(value, int | float if isinstance(usual, int | float) else type(usual))
