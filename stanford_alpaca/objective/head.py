"""Recognises by experiment what a causal LM does around its output layer.

It reads neither class names nor configurations. It puts known values in place of the output layer's
output and looks at the logits. Their slope at 0 is the scale, and what huge values become is the
cap. Two ramps of values then show whether the model does anything else.
"""

import math
from typing import Any, NamedTuple, NoReturn

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from stanford_alpaca.losses.types import Head
from stanford_alpaca.objective.probing import probe_inputs, probing

TINY, HUGE = 2.0**-30, 2.0**100  # powers of two, so that multiplying and dividing by them is exact
LOGIT_ROWS = 1024  # tokens whose logits are held at a time


class HeadForm(NamedTuple):
    """What a model does to its output layer's output: x -> softcap(logit_scale * x).

    A field is None if the model does not apply it.
    """

    softcap: float | None = None
    logit_scale: float | None = None

    def head(self, model: PreTrainedModel) -> Head:
        """Returns the head with the output layer's live parameters, so gradients reach them."""
        return Head(*_effective(output_layer(model)), self.softcap, self.logit_scale)

    def of(self, outputs: Tensor) -> Tensor:
        """Returns the logits of the output layer's output."""
        z = outputs if self.logit_scale is None else outputs * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def __str__(self) -> str:
        return (
            f"a scale of {self.logit_scale or 1.0:.7g} and "
            f"{'no cap' if not self.softcap else f'a cap of {self.softcap:.7g}'}"
        )


def output_layer(model: PreTrainedModel) -> nn.Module:
    """Returns the output layer of a causal LM.

    It is linear. It may have peft's LoRA, or be a copy that peft trains. Raises ValueError for any
    other layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(_original(layer), nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear output layer to attach an objective to"
        )
    return layer


def original_weight(model: PreTrainedModel) -> Tensor:  # [V, H]
    """Returns the output layer's weight without what peft has put beside it."""
    return _original(output_layer(model)).weight


def _original(layer: nn.Module) -> Any:
    if isinstance(layer, LoraLayer):
        return layer.base_layer
    return layer.original_module if isinstance(layer, ModulesToSaveWrapper) else layer


def _effective(layer: Any) -> tuple[Tensor, Tensor | None]:  # [V, H], [V]
    """Returns weight and bias of the linear map that the layer is now.

    LoRA's dropout is not part of it: ``add_lora`` gives the output layer none.
    """
    original = _original(layer)
    if (
        isinstance(layer, ModulesToSaveWrapper)
        and layer.active_adapters
        and not layer.disable_adapters
    ):
        original = layer.modules_to_save[layer.active_adapters[0]]
    weight = original.weight
    if isinstance(layer, LoraLayer) and not layer.disable_adapters and not layer.merged:
        for name in layer.active_adapters:
            delta = layer.get_delta_weight(name)  # type: ignore[attr-defined]
            weight = weight + delta.to(weight.dtype)
    return weight, original.bias


def head_of(model: PreTrainedModel) -> Head:
    """Recognises the head and returns it with the live parameters.

    It takes two forward passes of four tokens, so call it once per model.
    """
    return recognise_head(model).head(model)


@torch.no_grad()
def recognise_head(model: PreTrainedModel) -> HeadForm:
    """Recognises how the last hidden state becomes the logits, and verifies it on four tokens.

    The model may have any dtype, be on any device and be in training mode, and is left as it was.
    It must not be on the meta device or sharded. Scale and cap are exact if the model keeps the
    dtype of what it is given (the probe is float64). A factor between hidden state and output layer
    becomes part of the scale. It is read from float32 hidden states to about 1e-7.

    Raises:
        ValueError: the logits are not softcap(scale * (hidden @ weight.T + bias)). The message says
            what was seen.
    """
    layer = output_layer(model)
    weight, bias = _effective(layer)
    if weight.is_meta or weight.dim() != 2:
        _refuse(
            model,
            "its output layer is on the meta device or sharded: load it first, "
            "and attach before wrapping",
        )
    sent = _known_values(weight.shape[0], weight.device)
    hidden, received, returned, logits = _probe(model, layer, sent)
    if not _same(returned, F.linear(received, weight, bias)):
        _refuse(
            model,
            "its output layer returns something else than input @ weight.T + bias "
            "(quantised, or with an adapter)",
        )
    factor = _factor(model, received, hidden)
    if factor != 1.0 and bias is not None:
        _refuse(
            model,
            f"its output layer has a bias and receives {factor:.7g} times the last hidden state",
        )
    form = _read(model, sent, logits)
    scale = factor * (form.logit_scale or 1.0)
    return HeadForm(form.softcap, None if scale == 1.0 else scale)


def body_of(model: PreTrainedModel) -> nn.Module:
    """Returns the part of the model whose first output goes into the output layer.

    This is the base model. If that contains the output layer (Llama 4), it is the outermost part
    that has the embedding but not the output layer.
    """
    body: nn.Module = model.base_model
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    while outer is not None and outer in body.modules():
        body = next(part for part in body.children() if inner in part.modules())
    return body


def _known_values(
    vocab_size: int, device: torch.device
) -> Tensor:  # [1, 4, V] float64, exact in float32
    ramp = torch.linspace(-1, 1, vocab_size, device=device)
    return torch.stack(
        [torch.full_like(ramp, TINY), torch.full_like(ramp, HUGE), 10 * ramp, -1000 * ramp]
    ).double()[None]


def _probe(
    model: PreTrainedModel, layer: nn.Module, sent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the model with ``sent`` in place of the output layer's output.

    Returns the last hidden state, the output layer's input and own output, and the logits.
    """
    calls = []

    def replace_output(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        calls.append((inputs[0].detach(), output.detach()))
        return sent

    with probing(model):
        inputs = probe_inputs(model)
        hidden = body_of(model)(**inputs, return_dict=True)[0]
        hook = layer.register_forward_hook(replace_output)
        try:
            # logits that require a gradient show that parameters act after the output layer
            with torch.enable_grad():
                logits = model(**inputs, return_dict=True).logits
        finally:
            hook.remove()
    if len(calls) != 1:
        _refuse(model, f"its forward calls its output layer {len(calls)} times, not once")
    if logits.requires_grad:
        _refuse(
            model, "trained parameters take part behind its output layer, and would get no gradient"
        )
    if logits.shape != sent.shape:
        _refuse(
            model,
            f"its output layer returns {tuple(sent.shape)} "
            f"and its logits are {tuple(logits.shape)}",
        )
    return hidden, *calls[0], logits


def _factor(model: PreTrainedModel, received: Tensor, hidden: Tensor) -> float:
    """Returns the factor from the last hidden state to the output layer's input.

    It is exactly 1.0 if they are the same.
    """
    if hidden.shape == received.shape:
        hidden = hidden.to(received.device)
        if _same(received, hidden):
            return 1.0
        x, h = received.double(), hidden.double()
        factor = ((x * h).sum() / (h * h).sum()).item()
        exact = min(torch.finfo(received.dtype).bits, torch.finfo(hidden.dtype).bits) >= 32
        if _same(received, factor * hidden):
            if exact and factor > 0:
                return factor
            _refuse(
                model,
                f"its output layer receives {factor:.4g} times the last hidden state: "
                "load it in float32",
            )
    _refuse(
        model,
        "its output layer receives something else than base_model's first output, "
        "the last hidden state",
    )


def _same(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ only by rounding, as the same operations in another order do."""
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(want.dtype).eps)
    tolerance = 64 * eps if eps < 1e-6 else eps / 4
    return got.shape == want.shape and bool(
        (got.double() - want.double()).norm() <= tolerance * want.double().norm()
    )


def _read(model: PreTrainedModel, sent: Tensor, logits: Tensor) -> HeadForm:
    """Reads scale and cap from the logits, and checks that they explain all known values."""
    if torch.equal(logits, sent.to(logits.dtype)):
        return HeadForm()
    if torch.finfo(logits.dtype).bits < 32:
        _refuse(
            model,
            f"it changes its logits and returns them in {logits.dtype}, "
            "too coarse to recognise how",
        )
    tolerance = 64 * torch.finfo(logits.dtype).eps
    got = logits.double()
    scale, top = got[0, 0, 0].item() / TINY, got[0, 1, 0].item()
    if not 0 < scale < math.inf:
        _refuse(
            model,
            f"it does something unknown to its logits: near 0 they are {scale:.7g} times "
            "its output layer's output",
        )
    capped = abs(top - scale * HUGE) > tolerance * abs(top)
    form = HeadForm(top if capped else None, None if abs(scale - 1) <= tolerance else scale)
    want = form.of(sent)
    # not ">", because NaN is wrong, too
    wrong = ((got - want).abs() <= tolerance * want.abs()).logical_not().nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        values = (
            f"{sent[at].item():.7g} would become {want[at].item():.7g} "
            f"and became {got[at].item():.7g}"
        )
        _refuse(model, f"it does something unknown to its logits: with {form}, {values}")
    return form


def _refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    raise ValueError(f"{type(model).__name__} cannot be served: {reason}")
