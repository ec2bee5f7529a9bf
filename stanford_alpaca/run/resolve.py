"""What flags leave open is written here, once, and nowhere else: checks only look, and what follows only reads."""

from stanford_alpaca.distributed.weights import stored_buffers
from stanford_alpaca.run.arguments import Run, TrainingArguments


def resolve(run: Run) -> None:
    """Completes the arguments of a run that was checked."""
    training = run.training
    training.resume_from_checkpoint = asked_checkpoint(training)
    if run.data.streaming:
        training.accelerator_config.dispatch_batches = (
            False  # every rank reads the stream and takes its part
        )
    if training.global_batch is not None:
        training.gradient_accumulation_steps = accumulation_of(training)
    if training.fsdp and training.world_size > 1 and stored_buffers(run.source.empty()):
        training.fsdp_plugin_args["cpu_ram_efficient_loading"] = (
            False  # accelerate sends parameters only: all read
        )


def start_from(training: TrainingArguments, checkpoint: str | None) -> None:
    """Has the Trainer and its trackers know the checkpoint that was chosen."""
    training.resume_from_checkpoint = checkpoint


def asked_checkpoint(training: TrainingArguments) -> str | bool | None:
    """--resume_from_checkpoint: a folder, True for the newest one, which is Hugging Face's way to say it, or None."""
    asked = training.resume_from_checkpoint
    words = {"true": True, "false": None}
    return words.get(str(asked).lower(), asked)


def accumulation_of(training: TrainingArguments) -> int:
    """The micro-batches that make --global_batch, rounded down."""
    return int(training.global_batch or 0) // (training.train_batch_size * training.world_size)
