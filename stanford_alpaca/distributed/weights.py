"""Lets one rank read the weights while the engine sends the other ranks their shards.

So no host has to hold the model once for every GPU.
"""

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
    """Makes a rank that loads a model inside the block load it whole, under ZeRO-3 too.

    Under ZeRO-3 transformers would load shards, and resizing, the probe of the output layer and the
    frozen cost would see empty weights. DeepSpeed shards the model when the Trainer hands it over.
    """
    config = deepspeed_of(args)
    # DeepSpeed calls collectives by their old names, and PyTorch warns every time
    if config is not None:
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def weights_come_from_rank_0(args: TrainingArguments) -> bool:
    """Returns whether rank 0 alone reads the weights, and the engine sends the others their shards.

    This holds for FSDP2 and ZeRO-3 with several ranks. Otherwise every rank would hold the whole
    model in memory before it is sharded.
    """
    reads_once = not args.fsdp or args.fsdp_plugin_args["cpu_ram_efficient_loading"]
    return shards_weights(args) and reads_once and args.world_size > 1


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of the state dict that are not parameters.

    An example is what a router has learned about its experts.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def materialize_on_cpu(model: nn.Module) -> None:
    """Gives parameters on the meta device uninitialised memory on the CPU.

    Nothing is written there, so the system does not spend the memory yet.
    """
    seen: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in seen:
                    seen[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device="cpu"), parameter.requires_grad
                    )
                module._parameters[name] = seen[id(parameter)]
