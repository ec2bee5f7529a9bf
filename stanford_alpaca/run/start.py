"""Decides where a run starts: at the beginning, at an intact checkpoint of its own, or nowhere."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.kinds import FSDP, PLAIN, ZERO, check_resumable, check_state
from stanford_alpaca.checkpoint.pickles import refuse_code
from stanford_alpaca.checkpoint.run_file import RUN_FILE, RUN_FILE_FROM, read_run
from stanford_alpaca.checkpoint.saving import STAGING, recover
from stanford_alpaca.distributed.engine import deepspeed_of, shards_weights
from stanford_alpaca.errors import ResumeError, UserError
from stanford_alpaca.losses.own import COPY
from stanford_alpaca.run.arguments import Run, TrainingArguments
from stanford_alpaca.run.lock import LOCK_FILE
from stanford_alpaca.run.record import changes, record_of
from stanford_alpaca.training.progress import LOG_FILE

AUTO = "auto"
# files and folders that a run may have made before its first checkpoint
RUN_FILES = {
    LOCK_FILE, RUN_FILE, f"{RUN_FILE}.part", COPY, STAGING, "samples.jsonl", LOG_FILE, "runs",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a run starts, as rank 0 found out.

    Attributes:
        record: the record of this run, see ``record_of``.
        checkpoint: the folder to resume from, or None.
        notes: lines for the user.
        complete: whether the output folder already holds what this run would make.
    """

    record: dict[str, Any]
    checkpoint: str | None = None
    notes: list[str] = field(default_factory=list)
    complete: bool = False


def where_to_start(run: Run) -> Start:
    """Returns where a run starts.

    To be called on one rank, which must have locked the output folder. Reads every file of the
    checkpoint it chooses.

    Raises:
        ResumeError: nothing that was saved is intact, or it belongs to another run.
        UserError: the flags do not fit what the output folder holds.
    """
    training, output = run.training, Path(run.training.output_dir)
    record, asked, fits = record_of(run), training.resume_from_checkpoint, _fits(training)
    if training.resume != AUTO and asked is None:
        return Start(record)
    recover(output)
    if asked not in (None, True):
        return _from_named(Path(asked), output, record, fits)
    finished = training.resume == AUTO and (output / manifest.MANIFEST_FILE).is_file()
    wrong = manifest.summary(output) if finished else ""
    if finished and not wrong:
        written = manifest.read(output)["run"]
        if not written:
            raise UserError(
                f"--output_dir {output} holds a model that no run wrote (merged, or exported); "
                "give another"
            )
        _refuse(output, written, record)
        upload = f" (to upload it: hf upload NAME {output})" if training.push_to_hub else ""
        return Start(
            record,
            None,
            [f"{output}: this run is complete; nothing is left to do{upload}"],
            complete=True,
        )
    start = _from_newest(output, record, fits, strict=training.resume == AUTO)
    if start is not None:
        notes = [f"{output}: the finished model is made again, for {wrong}"] if wrong else []
        return replace(start, notes=[*notes, *start.notes])
    if wrong:
        raise ResumeError(
            f"{output}: the finished model is not what was saved ({wrong}), "
            "and there is no checkpoint to make it again from; "
            "put right what has changed, or give another --output_dir"
        )
    return _from_none(output, record)


def _from_named(
    checkpoint: Path, output: Path, record: dict[str, Any], fits: Callable[[Path], None]
) -> Start:
    reason = _reasons(checkpoint, fits)
    if reason:
        raise ResumeError(
            f"{checkpoint}: {reason}; --resume auto looks for an older one that is whole"
        )
    newer = [
        folder
        for folder in manifest.checkpoints(output)
        if manifest.step_of(folder) > manifest.read(checkpoint)["step"]
    ]
    if newer:
        raise UserError(
            f"{output} has {newer[0].name}, which is newer than {checkpoint}: "
            "give another --output_dir, or take the newer away"
        )
    return _go_on(checkpoint, record, strict=False)


def _from_newest(
    output: Path, record: dict[str, Any], fits: Callable[[Path], None], strict: bool
) -> Start | None:
    """Returns a start at the newest intact checkpoint, or None if there is no checkpoint."""
    broken: list[str] = []
    for folder in manifest.checkpoints(output):
        reason = _reasons(folder, fits)
        if not reason:
            # This file exists if the user has resumed from here with other flags.
            later = read_run(output, RUN_FILE_FROM.format(folder.name))
            start = _go_on(
                folder, record, strict and (later is None or bool(changes(later, record)[0]))
            )
            return replace(start, notes=[*(f"passed over {line}" for line in broken), *start.notes])
        broken.append(f"{folder.name}: {reason}")
    if broken:
        raise ResumeError(
            f"{output}: no checkpoint is good ({'; '.join(broken)}); "
            "give another --output_dir to start anew"
        )
    return None


def _from_none(output: Path, record: dict[str, Any]) -> Start:
    """Returns a start at the beginning, in a folder that is new or this run's own."""
    before = read_run(output)
    if before is not None:
        _refuse(
            output,
            before,
            record,
            more="; it saved no checkpoint, so the folder may be deleted, too",
        )
        return Start(
            record, None, [f"{output}: no checkpoint yet, training starts from the beginning"]
        )
    if any(file.name not in RUN_FILES for file in output.iterdir()):
        raise UserError(
            f"--output_dir {output} is not empty, and no run of this command wrote to it; "
            "give another"
        )
    return Start(record)


def _go_on(checkpoint: Path, record: dict[str, Any], strict: bool) -> Start:
    """Returns a start at an intact checkpoint.

    With ``strict`` no flag that decides the result may differ. Data and models may never differ.
    """
    before = manifest.read(checkpoint)["run"]
    _refuse(checkpoint, before, record, strict)
    flags, _, rounding = changes(before, record)
    noted = [f"{checkpoint.name}: {line}" for line in [*flags, *rounding]]
    return Start(record, str(checkpoint), [f"going on from {checkpoint}", *noted])


def _refuse(
    folder: Path,
    before: dict[str, Any],
    record: dict[str, Any],
    strict: bool = True,
    more: str = "",
) -> None:
    flags, contents, _ = changes(before, record)
    matters = [*(flags if strict else []), *contents]
    if matters:
        raise ResumeError(
            f"{folder} is of another run: {'; '.join(matters)}; "
            f"give the same command to go on, or another --output_dir{more}"
        )


def _fits(training: TrainingArguments) -> Callable[[Path], None]:
    """Returns a check that raises UserError if this run's engine cannot use a checkpoint."""
    engine = FSDP if training.fsdp else PLAIN if deepspeed_of(training) is None else ZERO
    stage_3 = engine == ZERO and shards_weights(training)

    def fits(checkpoint: Path) -> None:
        check_resumable(checkpoint, engine, training.world_size, stage_3)
        about = manifest.read(checkpoint)
        if "world_size" not in about:
            raise ResumeError(
                f"{manifest.MANIFEST_FILE}: does not say how many processes wrote the others"
            )
        check_state(
            checkpoint,
            about["step"],
            ranks=training.world_size if about["world_size"] == training.world_size else 0,
        )

    return fits


def _reasons(checkpoint: Path, fits: Callable[[Path], None]) -> str:
    """Returns why a checkpoint cannot be used, or an empty string if it can."""
    wrong = manifest.summary(checkpoint)
    if wrong:
        return wrong
    try:
        fits(checkpoint)
        refuse_code(checkpoint)
    except UserError as error:
        return str(error)
    return ""
