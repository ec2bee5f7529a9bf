"""A causal LM's parameters by part, and the tensors that it saves for the backward pass.

Both are counted from its configuration, and no memory is allocated for tensors.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, PreTrainedModel

from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.models.load import auto_class
from stanford_alpaca.objective.head import body_of
from stanford_alpaca.training import fsdp
from stanford_alpaca.training.hardware import EXPERTS, training_flops

SCALARS = (bool, int, float, str, type(None))
OUTSIDE, INPUT = -1, -2  # places of tensors, beside the decoder layers' numbers from 0 on


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part.

    FSDP gathers these units: ``embedding``, each layer, and ``norm`` + ``head``.
    """

    embedding: int  # position embeddings included
    layers: int  # all decoder layers together
    layer: int  # the largest one
    norm: int  # what is left
    head: int  # 0 if tied to the embedding
    vocab_size: int
    width: int  # of the output layer's rows

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.norm + self.head

    @property
    def tied(self) -> bool:
        return self.head == 0


@dataclass(frozen=True)
class Line:
    """Bytes as a function of the batch: ``fixed + per_row * rows``."""

    fixed: int
    per_row: int

    def of(self, rows: int) -> int:
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps from the forward to the backward pass, without parameters."""

    outside: Line  # embedding, rotary tables, mask, final norm
    layers: Line  # all decoder layers together
    layer: Line  # the largest one
    inputs: Line  # the inputs of all layers, which are what activation checkpointing keeps
    widest: Line  # the largest of these tensors that grows with the batch


@dataclass(frozen=True)
class ModelProfile:
    """What an estimate has to know about a model."""

    parameters: Parameters
    flops: tuple[float, float]  # (a, b): training on n tokens takes a n + b n^2
    layer_flops: float  # the part of a that is spent in decoder layers
    activations: Activations  # at the length and in the precision asked for


def profile_model(
    config: Any, length: int, precision: str, remote_code: bool = False
) -> ModelProfile:
    """Counts parameters on the meta device and activations on fake tensors of ``length`` tokens.

    Args:
        config: a transformers configuration.
        precision: ``float32``; ``autocast`` (float32 weights and bfloat16 products, as none and ddp
            have); or ``bfloat16`` (bfloat16 weights too, as fsdp and ZeRO have).

    Raises:
        UserError: the model cannot be built or run without its weights.
    """
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=remote_code)
        parameters, flops = count_parameters(model), training_flops(model)
        layer_flops = flops[0] - 6.0 * (parameters.norm + (parameters.head or parameters.embedding))
        return ModelProfile(
            parameters,
            flops,
            layer_flops,
            count_activations(config, length, precision, remote_code),
        )
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        experts = next((name for name in EXPERTS if getattr(config, name, None)), None)
        reason = f"it has experts, {experts}" if experts else first_line(error)
        raise UserError(
            f"a {config.model_type} model cannot be estimated from its configuration ({reason})"
        ) from None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules that FSDP makes units of. Raises UserError if there are no layers."""
    names = fsdp.layer_classes(model)
    return [module for module in body_of(model).modules() if type(module).__name__ in names]


def count_parameters(model: PreTrainedModel) -> Parameters:
    """Counts the parameters by part, each once."""
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    everything = sum(p.numel() for p in model.parameters())
    own_head = 0 if head is inputs else head.numel()
    embedding = sum(
        p.numel()
        for m in body_of(model).modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters()
    )
    norm = everything - embedding - sum(sizes) - own_head
    return Parameters(embedding, sum(sizes), max(sizes), norm, own_head, *head.shape)


def count_activations(
    config: Any, length: int, precision: str, remote_code: bool = False
) -> Activations:
    """Counts activations in a forward pass of one row and in one of two rows.

    Both run on fake CPU tensors, where attention takes a kernel that keeps no scores. Attention
    gets a mask, as it does for a batch with padding, because transformers cannot look into fake
    tensors. Of equal layers, two run.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    text = config.get_text_config()  # training runs only the text part
    config = text if type(text) in AutoModelForCausalLM._model_mapping else config
    with FakeTensorMode():
        model = (
            auto_class(config)
            .from_config(config, dtype=dtype, trust_remote_code=remote_code)
            .train()
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            one, two = (saved_tensors(model, rows, length) for rows in (1, 2))
    sizes = [(place, Line(2 * a - b, b - a)) for (place, a), (_, b) in zip(one, two, strict=True)]

    def total(wanted: int) -> Line:
        lines = [line for place, line in sizes if place == wanted]
        return Line(sum(line.fixed for line in lines), sum(line.per_row for line in lines))

    numbers = {place for place, _ in sizes if place >= 0}
    by_layer = [total(number) for number in numbers]
    return Activations(
        outside=total(OUTSIDE),
        layers=Line(sum(line.fixed for line in by_layer), sum(line.per_row for line in by_layer)),
        layer=max(by_layer, key=lambda line: line.of(1)),
        inputs=total(INPUT),
        widest=max(
            (line for place, line in sizes if place != INPUT), key=lambda line: line.per_row
        ),
    )


def saved_tensors(model: PreTrainedModel, rows: int, length: int) -> list[tuple[int, int]]:
    """Returns place and bytes of each storage that a forward pass of the base model saves.

    These are the storages saved for the backward pass, without parameters. The place is the number
    of a decoder layer, or OUTSIDE. The layers' inputs are listed once more, as INPUT.
    """
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
    found: list[tuple[int, int]] = []
    place = OUTSIDE

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage  # kept, so that no other storage gets its address
            found.append((place, storage.nbytes()))
        return tensor

    def enter(number: int, args: tuple, kwargs: dict) -> None:
        nonlocal place
        place, hidden = number, args[0] if args else kwargs["hidden_states"]
        found.append((INPUT, hidden.untyped_storage().nbytes()))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal place
        outputs[place], place = output, OUTSIDE

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    layers = decoder_layers(model)
    outputs: dict[int, Any] = {}
    twins = twins_of(layers, model.config)
    for number, twin in twins.items():
        layers[number].forward = lambda *_, like=twin, **__: tree_map(copied, outputs[like])
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(
                lambda _, args, kwargs, n=number: enter(n, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, length, dtype=torch.long)
        body_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    in_twins = [(n, size) for n, twin in twins.items() for at, size in found if at == twin]
    return found + in_twins


def twins_of(layers: list[nn.Module], config: Any) -> dict[int, int]:
    """Returns, for layers that need not run, the number of an earlier layer that saves the same.

    That is the second layer of the kind: the first also saves what all share, as the mask.
    """
    kinds: dict[Any, list[int]] = {}
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    for number, (layer, kind) in enumerate(zip(layers, types, strict=True)):
        settings = [
            {k: v for k, v in vars(m).items() if k != "layer_idx" and isinstance(v, SCALARS)}
            for m in layer.modules()
        ]
        kinds.setdefault((str(layer), str(settings), kind), []).append(number)
    return {number: like[1] for like in kinds.values() for number in like[2:]}
