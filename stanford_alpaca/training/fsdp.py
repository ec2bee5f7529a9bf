"""FSDP2, also on a CPU, with the units and tied weights that a loss inside the model needs."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp_utils
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from stanford_alpaca.errors import UserError
from stanford_alpaca.objective.head import body_of
from stanford_alpaca.training.cost_sharding import wrap_separately


def activate_fsdp(trainer: Any) -> None:
    """Makes ``--fsdp`` mean FSDP2 on CPU too, where accelerate would ignore it and train with DDP.

    Raises:
        UserError: accelerate chose another engine.
    """
    args = trainer.args
    if not args.fsdp:
        return
    layers = layer_classes(trainer.model, args.fsdp_config.get("transformer_layer_cls_to_wrap"))
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        # Everything is on the CPU already, and offloading would pin memory.
        options = args.fsdp_plugin_args | {"cpu_offload": False}
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
        # Every new AcceleratorState copies PartialState's type, so both have to be set.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if state.distributed_type != DistributedType.FSDP:
        raise UserError(f"--fsdp was asked for, but accelerate chose {state.distributed_type}")
    plugin = state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = layers
    wrap_separately(trainer.model, plugin)
    # accelerate's own function does not look into adapted and nested models.
    fsdp_utils._find_final_norm = final_norm
    if isinstance(trainer.model, PeftModel):
        keep_copies_tied(trainer.model)
    if args.bf16:
        # accelerate's own policy would round the loss to bf16 and sum gradients in bf16.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if plugin.activation_checkpointing:
        # accelerate's own would recompute layers with other dropout masks.
        plugin.activation_checkpointing = False
        apply_activation_checkpointing(
            trainer.model, check_fn=lambda module: type(module).__name__ in layers
        )


def final_norm(model: nn.Module) -> nn.Module | None:
    """Returns the norm before the output layer, or None if there is none.

    accelerate puts both into one FSDP unit. When the norm has run, the unit is gathered, so the
    loss reads the whole output layer.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        return None
    body: Any = body_of(inner)
    decoder = body.get_decoder()
    return next(
        (part for part in reversed(list(decoder.children())) if "Norm" in type(part).__name__), None
    )


def keep_copies_tied(model: PeftModel) -> None:
    """Makes accelerate tie peft's trained copies of tied embeddings, as transformers cannot."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(outer, ModulesToSaveWrapper) or inner.weight is not outer.weight:
        return

    def tie_weights() -> None:
        outer.original_module.weight = inner.original_module.weight
        for name, copied in outer.modules_to_save.items():
            copied.weight = inner.modules_to_save[name].weight

    model.__dict__["tie_weights"] = tie_weights


def layer_classes(model: PreTrainedModel, named: list[str] | None = None) -> list[str]:
    """Returns the class names of the layers that FSDP shards one by one.

    These are the given names, else the model's own list, else the class of the layers in the
    model's largest stack.

    Raises:
        UserError: no layer has a given name, or the model has no stack of layers of one class.
    """
    classes = {type(module).__name__ for module in model.modules()}
    own = sorted(set(model._no_split_modules or []) & classes)
    for name in named or []:
        if name not in classes:
            raise UserError(
                f"--fsdp_config transformer_layer_cls_to_wrap {name}: the model has no such layer; "
                f"its own: {', '.join(own)}"
            )
    if named or own:
        return named or own
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({*map(type, module)}) == 1
    ]
    if not stacks:
        raise UserError(
            "--fsdp: no stack of layers in the model; "
            "name their class in --fsdp_config transformer_layer_cls_to_wrap"
        )
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return [type(next(iter(largest))).__name__]
