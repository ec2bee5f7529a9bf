"""What a run leaves behind: a plain Hugging Face folder, whatever engine trained it."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def full_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The whole weights of a model that FSDP2 shards, on the CPU of the ranks with ``keep``; empty on the others.

    Every rank has to call it: one all-gather per parameter, so no device ever holds more than one whole parameter extra.
    """
    owner = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    gathered: dict[object, Tensor | None] = {}  # tied weights stay one tensor, so that they are written once
    for name, value in model.state_dict().items():
        key = owner.get(name, name)
        if key not in gathered:
            whole = _gather(value) if isinstance(value, DTensor) else value
            gathered[key] = whole.to("cpu", copy=True) if keep else None
        tensor = gathered[key]
        if tensor is not None:
            state[name] = tensor
    return state


def _gather(shards: DTensor) -> Tensor:
    """The whole tensor; shards that were offloaded to the CPU first go back to where the ranks talk to each other."""
    there: DTensor = shards.to(shards.device_mesh.device_type)  # type: ignore[assignment]
    return there.full_tensor()
