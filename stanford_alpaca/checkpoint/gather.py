"""Gathers the whole weights of a sharded model, one parameter at a time."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def full_state_dict(model: nn.Module, keep: bool, trained_only: bool = False) -> dict[str, Tensor]:
    """Returns the whole weights of a model that FSDP2 or ZeRO shards.

    Ranks with ``keep`` get them on the CPU; the other ranks get an empty dict. The dtype is that of
    the master weights, even where ZeRO computes in bfloat16. ``trained_only`` leaves out frozen
    weights.

    Every rank has to call it. Collectives: one all-gather per parameter (under ZeRO-2 an
    all-reduce). So no device ever holds more than one additional whole parameter.
    """
    values = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {}
    # tied weights share an entry: they stay one tensor and are written once
    gathered: dict[object, Tensor | None] = {}
    for name, value in values.items():
        parameter = parameters.get(name)
        if trained_only and not (parameter is not None and parameter.requires_grad):
            continue
        key = name if parameter is None else id(parameter)
        if key not in gathered:
            gathered[key] = _on_cpu(value, parameter, keep)
        tensor = gathered[key]
        if tensor is not None:
            state[name] = tensor
    return state


def _on_cpu(value: Tensor, parameter: nn.Parameter | None, keep: bool) -> Tensor | None:
    """Gathers one entry and returns it on the CPU, or None without ``keep``.

    The gathered copy is freed before the next entry.
    """
    whole = _whole(value, parameter)
    return whole.to("cpu", copy=True) if keep else None


def _whole(value: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """Returns the whole tensor of a state dict entry.

    The entry is a shard under FSDP2 and empty under ZeRO-3.
    """
    # an offloaded shard goes back to the device on which the ranks communicate
    if isinstance(value, DTensor):
        return value.to(value.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return value
