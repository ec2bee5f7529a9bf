"""Where a run starts: from the beginning, from a checkpoint that is whole and belongs to it, or not at all."""

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
from stanford_alpaca.run.arguments import Run, TrainingArguments
from stanford_alpaca.run.lock import LOCK_FILE
from stanford_alpaca.run.record import changes, record_of

AUTO = "auto"
OWN = {
    LOCK_FILE,
    RUN_FILE,
    f"{RUN_FILE}.part",
    STAGING,
    "samples.jsonl",
    "runs",
}  # what there may be before the first checkpoint


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
                f"--output_dir {output} holds a model that no run wrote (merged, or exported); give another"
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
            f"{output}: the finished model is not what was saved ({wrong}), and there is no checkpoint to make it again from; "
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
            f"{output} has {newer[0].name}, which is newer than {checkpoint}: give another --output_dir, or take the newer away"
        )
    return _go_on(checkpoint, record, strict=False)


def _from_newest(
    output: Path, record: dict[str, Any], fits: Callable[[Path], None], strict: bool
) -> Start | None:
    """The newest checkpoint that is good; None if there is no checkpoint."""
    broken: list[str] = []
    for folder in manifest.checkpoints(output):
        reason = _reasons(folder, fits)
        if not reason:
            later = read_run(
                output, RUN_FILE_FROM.format(folder.name)
            )  # the user has asked for other flags from there on
            start = _go_on(
                folder, record, strict and (later is None or bool(changes(later, record)[0]))
            )
            return replace(start, notes=[*(f"passed over {line}" for line in broken), *start.notes])
        broken.append(f"{folder.name}: {reason}")
    if broken:
        raise ResumeError(
            f"{output}: no checkpoint is good ({'; '.join(broken)}); give another --output_dir to start anew"
        )
    return None


def _from_none(output: Path, record: dict[str, Any]) -> Start:
    """From the beginning, in a folder that is new or this run's."""
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
    if any(file.name not in OWN for file in output.iterdir()):
        raise UserError(
            f"--output_dir {output} is not empty, and no run of this command wrote to it; give another"
        )
    return Start(record)


def _go_on(checkpoint: Path, record: dict[str, Any], strict: bool) -> Start:
    """A start from a checkpoint that is whole. Flags may differ if the user named it, data and models never."""
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
            f"{folder} is of another run: {'; '.join(matters)}; give the same command to go on, or another --output_dir{more}"
        )


def _fits(training: TrainingArguments) -> Callable[[Path], None]:
    """Raises UserError for a checkpoint that this run's engine cannot go on from."""
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
    """Why a checkpoint is none, or nothing."""
    wrong = manifest.summary(checkpoint)
    if wrong:
        return wrong
    try:
        fits(checkpoint)
        refuse_code(checkpoint)
    except UserError as error:
        return str(error)
    return ""
