"""One rank reads the weights, the engine sends the others theirs: no host holds the model once for every GPU."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from stanford_alpaca.errors import UserError

T = TypeVar("T")


def weights_come_from_rank_0(args) -> bool:
    """Whether one rank reads the weights and the engine sends the others their shards: FSDP2 and ZeRO-3 with several ranks.

    Else every rank would hold the whole model in memory before it is sharded.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    shards = args.fsdp_plugin_args["cpu_ram_efficient_loading"] if args.fsdp else config is not None and config.is_zero3()
    return shards and args.world_size > 1


def share_from_rank_0(make: Callable[[], T] | None) -> T:
    """What ``make`` returns on rank 0, on all ranks; the others give None. One broadcast of a pickled object.

    Raises:
        UserError: on all ranks what ``make`` raised.
    """
    outcome: list[Any] = [None, None]
    if make is not None:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = str(error)
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def allocate(model: nn.Module) -> None:
    """Gives parameters on the meta device memory on the CPU, unwritten, so that the system spends none on it yet."""
    seen: dict[int, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in seen:
                    seen[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = seen[id(parameter)]
