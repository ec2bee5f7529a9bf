"""What a run leaves behind: a plain Hugging Face folder, whatever engine trained it."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def full_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The whole weights of a model that FSDP2 shards, on the CPU of the ranks with ``keep``; empty on the others.

    Every rank has to call it: one all-gather per parameter, so no device ever holds more than one whole parameter extra.
    """
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.cpu().clone() if whole.device.type == "cpu" else whole.cpu()
    return state
