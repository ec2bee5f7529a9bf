"""Chooses the layers of a model that get a LoRA adapter, and adds it."""

import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stanford_alpaca.errors import UserError, first_line, nearest
from stanford_alpaca.models.load import unread_parts

# the part of a name that peft adds where it wraps a layer
WRAPPED = re.compile(r"\.base_layer(?=\.)")
ALL_LINEAR = "all-linear"  # peft's word for all linear layers
LORA_EMBEDDINGS = ("frozen", "lora", "full")  # what LoRA does to the embedding and the output layer


def lora_layers(model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
    """Returns the names of the linear layers that get an adapter.

    These are the layers whose names end with one of ``targets``. By default they are all linear
    layers that can have an adapter, except the output layer.

    Raises:
        UserError: no such layer has a target's name.
    """
    targets = None if targets == [ALL_LINEAR] else targets
    output, unread = model.get_output_embeddings(), set(unread_parts(model))
    linear = [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and module is not output
    ]
    linear = [
        name
        for name in linear
        if f"{name}.weight" not in unread and not _refused_by_peft(model, name)
    ]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets or []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise UserError(
                f"--lora_target_modules {target}: no linear layer that can have an adapter; "
                f"choose from {', '.join(endings)}{nearest(target, endings)}"
            )
    return [
        name
        for name in linear
        if targets is None or any(f".{name}".endswith(f".{target}") for target in targets)
    ]


def _is_linear(module: nn.Module) -> bool:
    """Returns whether a layer is linear, by its class and by what its forward returns.

    A router may subclass ``nn.Linear`` and return more than one tensor, as Llama 4's does.
    """
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith(
        "transformers.models"
    ):
        return isinstance(module, nn.Linear | Conv1D)
    with torch.no_grad():
        return isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)


def _refused_by_peft(model: PreTrainedModel, name: str) -> bool:
    """Returns whether peft gives a layer of this model no adapter.

    It refuses the output projections of Mamba and its kind, whose kernels read the weights.
    """
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        return bool(check and check(LoraConfig(), model, name.rpartition(".")[2]))
    except ValueError:
        return True


def expert_parameters(model: nn.Module) -> list[str]:
    """Returns the name endings of experts' weights that are not layers.

    Such models keep the weights of all experts in one tensor.
    """
    whole = (
        name
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.dim() == 3
    )
    names = (WRAPPED.sub("", name) for name in whole if ".lora_" not in name)
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    targets: list[str] | None = None,
    embeddings: str = "frozen",  # one of LORA_EMBEDDINGS
    parameters: list[str] | None = None,  # endings of names, see ``expert_parameters``
) -> PeftModel:
    """Adds a float32 LoRA adapter to the model's ``lora_layers``.

    Only the adapter is trained, and what ``embeddings`` adds. The output layer's adapter has no
    dropout, because the loss has to read the layer as one weight. Tied embeddings stay tied.

    Raises:
        UserError: no layer has a target's name, or the choice of ``embeddings`` is not possible.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = ends[0].weight is ends[1].weight
    names = [name for name, module in model.named_modules() if module in ends]
    if tied and embeddings == "lora":
        raise UserError(
            "--lora_embeddings lora: the embedding is the output layer, "
            "and their adapters would differ; use full"
        )
    names = names[:1] if tied else names  # the input embedding is first; peft ties the other
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[*lora_layers(model, targets), *(names if embeddings == "lora" else [])],
        modules_to_save=names if embeddings == "full" else None,
        ensure_weight_tying=tied and embeddings == "full",
        target_parameters=parameters,
    )
    _check_parameters(model, parameters or [])
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--lora: peft gives this model no such adapter ({first_line(error)})"
        ) from None
    # an absolute path is found from any folder
    if Path(base := str(config.base_model_name_or_path)).is_dir():
        config.base_model_name_or_path = str(Path(base).resolve())
    output = model.get_output_embeddings()
    if tied and embeddings == "full" and not isinstance(output, ModulesToSaveWrapper):
        raise UserError(
            f"--lora_embeddings full: peft does not keep {names[0]} tied to this model's "
            "output layer; leave it frozen"
        )
    if isinstance(output, LoraLayer):
        output.lora_dropout["default"] = nn.Identity()
    return adapted


def _check_parameters(model: PreTrainedModel, endings: list[str]) -> None:
    """Raises UserError for an ending that no weights of experts have."""
    known = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in known):
            found = ", ".join(expert_parameters(model)) or "it has none"
            raise UserError(
                f"--lora_target_parameters {ending}: no weights of experts are named so; "
                f"choose from: {found}"
            )
