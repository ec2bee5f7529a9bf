"""Whole weights from a model that is sharded, one parameter at a time."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def full_state_dict(model: nn.Module, keep: bool, trained_only: bool = False) -> dict[str, Tensor]:
    """The whole weights of a model that FSDP2 or ZeRO shards, on the CPU of the ranks with ``keep``; empty on the others.

    ``trained_only`` leaves out what is frozen.

    They have the masters' dtype, also where ZeRO computes in bfloat16. Every rank has to call it: one all-gather (under
    ZeRO-2 an all-reduce) per parameter, so no device ever holds more than one whole parameter extra.
    """
    values = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {}
    gathered: dict[
        object, Tensor | None
    ] = {}  # tied weights stay one tensor, so that they are written once
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
    """Gathers one entry; what is not kept is free again before the next one."""
    whole = _whole(value, parameter)
    return whole.to("cpu", copy=True) if keep else None


def _whole(value: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """The whole tensor behind an entry of the state dict, which is a shard under FSDP2 and empty under ZeRO-3."""
    if isinstance(
        value, DTensor
    ):  # a shard that was offloaded goes back to where the ranks talk to each other
        return value.to(value.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return value
