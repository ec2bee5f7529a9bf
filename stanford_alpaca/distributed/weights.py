"""One rank reads the weights, the engine sends the others theirs: no host holds the model once for every GPU."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from stanford_alpaca.distributed.engine import deepspeed_of, shards_weights


@contextlib.contextmanager
def loading_whole(args: TrainingArguments) -> Iterator[None]:
    """Within it a rank that loads a model loads it whole, under ZeRO-3 too.

    There transformers would load shards, and resizing, the probe of the output layer and the frozen cost would see empty
    weights. DeepSpeed shards the model when the Trainer hands it over.
    """
    config = deepspeed_of(args)
    if (
        config is not None
    ):  # DeepSpeed calls collectives by their old names, and torch says so every time
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def weights_come_from_rank_0(args: TrainingArguments) -> bool:
    """Whether one rank reads the weights and the engine sends the others their shards: FSDP2 and ZeRO-3 with several ranks.

    Else every rank would hold the whole model in memory before it is sharded.
    """
    reads_once = not args.fsdp or args.fsdp_plugin_args["cpu_ram_efficient_loading"]
    return shards_weights(args) and reads_once and args.world_size > 1


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds beside parameters, such as what a router has learned about its experts."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def materialize_on_cpu(model: nn.Module) -> None:
    """Gives parameters on the meta device memory on the CPU, unwritten, so that the system spends none on it yet."""
    seen: dict[int, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in seen:
                    seen[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device="cpu"), parameter.requires_grad
                    )
                module._parameters[name] = seen[id(parameter)]
