"""Fills in what the flags leave open, after the checks, which only look.

``start_from`` follows once the checkpoint to start from is known.
"""

from stanford_alpaca.distributed.weights import stored_buffers
from stanford_alpaca.run.arguments import Run, TrainingArguments


def resolve(run: Run) -> None:
    """Completes the arguments of a run that has passed the checks."""
    training = run.training
    training.resume_from_checkpoint = asked_checkpoint(training)
    if run.data.streaming:
        # Every rank reads the stream and takes its part.
        training.accelerator_config.dispatch_batches = False
    if training.global_batch is not None:
        training.gradient_accumulation_steps = accumulation_of(training)
    if training.fsdp and training.world_size > 1 and stored_buffers(run.source.empty()):
        # accelerate sends parameters but no buffers, so every rank reads the model.
        training.fsdp_plugin_args["cpu_ram_efficient_loading"] = False


def start_from(training: TrainingArguments, checkpoint: str | None) -> None:
    """Tells the Trainer and its trackers which checkpoint was chosen."""
    training.resume_from_checkpoint = checkpoint


def asked_checkpoint(training: TrainingArguments) -> str | bool | None:
    """Returns the value of --resume_from_checkpoint: a folder, True for the newest one, or None.

    Hugging Face also uses True for the newest checkpoint.
    """
    asked = training.resume_from_checkpoint
    words = {"true": True, "false": None}
    return words.get(str(asked).lower(), asked)


def accumulation_of(training: TrainingArguments) -> int:
    """Returns how many micro-batches on each rank make --global_batch, rounded down."""
    return int(training.global_batch or 0) // (training.train_batch_size * training.world_size)
