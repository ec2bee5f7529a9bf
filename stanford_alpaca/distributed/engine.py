"""What trains a model, by name, and what that says about where weights are."""

from typing import Any, NamedTuple

from transformers import TrainingArguments


class Engine(NamedTuple):
    """An engine, by what it does to a model."""

    sharded: str = (
        ""  # w, g, o: weights, gradients and the optimizer's state are divided among the ranks
    )
    deepspeed: bool = False
    offload: bool = False  # all of them stay in the host's memory


ENGINES = {  # the simplest first
    "none": Engine(),
    "ddp": Engine(),
    "fsdp": Engine("wgo"),
    "zero1": Engine("o", deepspeed=True),
    "zero2": Engine("go", deepspeed=True),
    "zero3": Engine("wgo", deepspeed=True),
    "zero3_offload": Engine("wgo", deepspeed=True, offload=True),
}


def deepspeed_of(training: TrainingArguments) -> Any:
    """DeepSpeed's configuration as transformers has read it, or None where another engine trains."""
    return getattr(training, "hf_deepspeed_config", None)


def shards_weights(training: TrainingArguments) -> bool:
    """Whether the engine divides the weights among the ranks: FSDP2 and ZeRO-3."""
    config = deepspeed_of(training)
    return bool(training.fsdp) or (config is not None and config.is_zero3())
