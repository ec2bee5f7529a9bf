"""Engines by name, and which of them shard or offload a model."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # it takes seconds to import, and preflight does not need it
    from transformers import TrainingArguments


class Engine(NamedTuple):
    """An engine, by what it does to a model."""

    # what is sharded over the ranks: w weights, g gradients, o optimizer state
    sharded: str = ""
    deepspeed: bool = False
    offload: bool = False  # all of these stay in the host's memory


ENGINES = {  # the simplest first
    "none": Engine(),
    "ddp": Engine(),
    "fsdp": Engine("wgo"),
    "zero1": Engine("o", deepspeed=True),
    "zero2": Engine("go", deepspeed=True),
    "zero3": Engine("wgo", deepspeed=True),
    "zero3_offload": Engine("wgo", deepspeed=True, offload=True),
}


def deepspeed_of(training: "TrainingArguments") -> Any:
    """Returns DeepSpeed's configuration as transformers has read it, or None for other engines."""
    return getattr(training, "hf_deepspeed_config", None)


def shards_weights(training: "TrainingArguments") -> bool:
    """Returns whether the engine shards the weights over the ranks, as FSDP2 and ZeRO-3 do."""
    config = deepspeed_of(training)
    return bool(training.fsdp) or (config is not None and config.is_zero3())
