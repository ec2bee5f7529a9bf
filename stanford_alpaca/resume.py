"""Where a run starts: from the beginning, from a checkpoint that is whole and belongs to it, or not at all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stanford_alpaca.arguments import Run, TrainingArguments
from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.kinds import FSDP, PLAIN, ZERO, check_resumable
from stanford_alpaca.checkpoint.pickles import refuse_code
from stanford_alpaca.errors import ResumeError, UserError
from stanford_alpaca.lock import FILE as LOCK
from stanford_alpaca.record import changes, read_run, record_of

AUTO = "auto"


@dataclass(frozen=True)
class Start:
    """What rank 0 found out.

    Attributes:
        record: of this run; see ``record_of``.
        checkpoint: the folder to go on from, or None.
        notes: lines for the user.
        complete: the output folder already has what this run would make.
    """

    record: dict[str, Any]
    checkpoint: str | None = None
    notes: list[str] = field(default_factory=list)
    complete: bool = False


def where_to_start(run: Run) -> Start:
    """Reads every file of the checkpoint it chooses. For one rank; the output folder must be this run's alone.

    Raises:
        ResumeError: nothing that was saved is good, or it is another run's.
    """
    training, output = run.training, Path(run.training.output_dir)
    record, asked = record_of(run), training.resume_from_checkpoint
    if training.resume != AUTO and asked is None:
        return Start(record)
    fits = _fits(training)
    if training.resume != AUTO and asked is not True:
        passed = _reasons(Path(asked), fits)
        if passed:
            raise ResumeError(f"{asked}: {passed}; --resume auto looks for an older one that is whole")
        return _go_on(Path(asked), record, strict=False)
    if training.resume == AUTO and (output / manifest.FILE).is_file() and not manifest.problems(output):
        matters, _ = changes(manifest.read(output)["run"], record)
        _refuse(output, matters)
        return Start(record, None, [f"{output}: this run is complete; nothing is left to do"], complete=True)
    notes: list[str] = []
    broken: list[str] = []
    for folder in manifest.checkpoints(output):
        reason = _reasons(folder, fits)
        if not reason:
            start = _go_on(folder, record, strict=training.resume == AUTO)
            return Start(record, start.checkpoint, [*notes, *start.notes])
        broken.append(f"{folder.name}: {reason}")
        notes.append(f"passed over {broken[-1]}")
    if broken:
        raise ResumeError(f"{output}: no checkpoint is good ({'; '.join(broken)}); give another --output_dir to start anew")
    before = read_run(output)
    if before is None and any(file.name != LOCK for file in output.iterdir()):
        raise UserError(f"--output_dir {output} is not empty, and no run of this command wrote to it; give another")
    if before is None:
        return Start(record)
    _refuse(output, changes(before, record)[0])
    return Start(record, None, [f"{output}: no checkpoint yet, training starts from the beginning"])


def _go_on(checkpoint: Path, record: dict[str, Any], strict: bool) -> Start:
    """A start from a checkpoint that is whole. Flags may differ if the user named it, data and models never."""
    matters, rounds = changes(manifest.read(checkpoint)["run"], record)
    flags = [line for line in matters if line.startswith("--") and not line.startswith("--data_path:")]
    _refuse(checkpoint, matters if strict else [line for line in matters if line not in flags])
    noted = [f"{checkpoint.name}: {line}" for line in [*([] if strict else flags), *rounds]]
    return Start(record, str(checkpoint), [f"going on from {checkpoint}", *noted])


def _refuse(folder: Path, matters: list[str]) -> None:
    if matters:
        raise ResumeError(
            f"{folder} is of another run: {'; '.join(matters)}; give the same command to go on, or another --output_dir"
        )


def _fits(training: TrainingArguments) -> Callable[[Path], None]:
    """Raises UserError for a checkpoint that this run's engine cannot go on from."""
    zero = getattr(training, "hf_deepspeed_config", None)
    engine = FSDP if training.fsdp else PLAIN if zero is None else ZERO
    stage_3 = zero is not None and zero.is_zero3()
    return lambda checkpoint: check_resumable(checkpoint, engine, training.world_size, stage_3)


def _reasons(checkpoint: Path, fits: Callable[[Path], None]) -> str:
    """Why a checkpoint is none, or nothing."""
    found = manifest.problems(checkpoint)
    if found:
        return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    try:
        fits(checkpoint)
        refuse_code(checkpoint)
    except UserError as error:
        return str(error)
    return ""
