"""Finds a rank's part of a model's weights and gradients under every engine.

It can also keep DeepSpeed's optimizer from making an update.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# wrappers of modules put these into the names of weights
WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Shards:
    """This rank's part of a model: all of it, or its shards under FSDP or ZeRO.

    Args:
        model: the model, ready to be trained.
        zero: DeepSpeed's optimizer, if DeepSpeed trains. Without ZeRO (stage 0), in bf16, it hides
            the gradients: then there are none here.
    """

    def __init__(self, model: nn.Module, zero: Any = None):
        self._zero = zero
        self._named: list[tuple[str, Any]] = [
            (_plain(name), parameter) for name, parameter in model.named_parameters()
        ]
        self.of_weights = any(
            isinstance(p, DTensor) or hasattr(p, "ds_tensor") for _, p in self._named
        )
        self.of_gradients = self.of_weights or hasattr(zero, "averaged_gradients")

    def weights(self, trained_only: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yields the names and parts of the weights, except those that ZeRO has put on a disk."""
        for name, parameter in self._named:
            if parameter.requires_grad or not trained_only:
                shard = getattr(parameter, "ds_tensor", None)  # ZeRO-3's
                if shard is None:
                    yield name, _local(parameter)
                elif shard.status.name == "AVAILABLE":
                    before = torch.distributed.get_rank(parameter.ds_process_group) * shard.numel()
                    # the end of the shard may be padding that nobody wrote
                    yield name, shard[: max(0, parameter.ds_numel - before)]

    def gradients(self) -> list[Tensor]:
        """Returns the gradients as the engine keeps them between backward pass and update.

        One tensor need not be the gradient of one parameter.
        """
        if not hasattr(self._zero, "averaged_gradients"):
            return [
                _local(parameter.grad) for _, parameter in self._named if parameter.grad is not None
            ]
        kept = [part for parts in self._zero.averaged_gradients.values() if parts for part in parts]
        if kept:
            return kept
        # with offload, the flat float32 groups hold the gradients
        flat = (
            getattr(self._zero, "fp32_partitioned_groups_flat", None)
            or self._zero.single_partition_of_fp32_groups
        )
        return [group.grad for group in flat if group.grad is not None]

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the gradients by parameter, which may cost copies."""
        for name, parameter in self._named:
            if hasattr(parameter, "ds_tensor"):
                if parameter.requires_grad:
                    yield name, parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
            elif parameter.grad is not None:
                yield name, _local(parameter.grad)
            elif getattr(parameter, "_hp_mapping", None) is not None:
                # ZeRO-1 or ZeRO-2, and this rank has a part of the parameter
                yield (
                    name,
                    parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group),
                )


@torch.no_grad()
def not_finite(tensors: Iterable[Tensor], zero: Tensor) -> Tensor:
    """Returns 1 if any element is NaN or Inf, or too large for a norm, else 0.

    The result is on the device of ``zero``. There is no synchronisation.
    """
    parts = [tensor.detach() for tensor in tensors]
    if not parts:
        return zero
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    norms = torch._foreach_norm(parts, 2.0, dtype=dtype)
    return (
        ~torch.stack([norm.to(zero.device, non_blocking=True) for norm in norms]).sum().isfinite()
    ).to(zero.dtype)


def culprits(parts: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns the names of tensors with NaN or Inf, or too large for a norm. Synchronises."""
    return [
        name
        for name, part in parts
        if bool(not_finite([part], torch.zeros((), device=part.device)))
    ]


def gate_step(optimizer: Any, may_update: Callable[[], bool]) -> None:
    """Makes the step of DeepSpeed's optimizer ask ``may_update`` first.

    DeepSpeed takes this step in its backward pass. If the answer is no, the gradients are dropped.
    """
    update = optimizer.step

    def guarded(*args: Any, **kwargs: Any) -> None:
        if hasattr(optimizer, "_wait_for_offload_copies"):
            optimizer._wait_for_offload_copies()
        if may_update():
            update(*args, **kwargs)
        elif hasattr(optimizer, "averaged_gradients"):
            _leave_out(optimizer, update)
        else:  # stage 0
            optimizer.zero_grad()

    optimizer.step = guarded


def _leave_out(optimizer: Any, update: Callable[[], None]) -> None:
    """Drops a step's gradients in ZeRO's own way: tells the update that one of them overflowed."""

    def overflows(*args: Any, **kwargs: Any) -> None:
        optimizer.overflow = True

    name = (
        "_overflow_check_and_loss_scale_update"
        if hasattr(optimizer, "fp16_groups")
        else "check_overflow"
    )
    checks = getattr(optimizer, "check_grad_overflow", None)
    setattr(optimizer, name, overflows)
    optimizer.check_grad_overflow = True  # stages 1 and 2 look at this
    update()
    delattr(optimizer, name)
    optimizer.check_grad_overflow = checks
    optimizer.overflow = False  # otherwise the learning rate schedule would not step


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
