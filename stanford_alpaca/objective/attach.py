"""Attaches an objective to any Hugging Face causal language model, and detaches it again.

Given ``labels``, the model then computes the objective within ``model(**batch)``, so DDP, FSDP and
ZeRO see an ordinary forward pass. Labels are shifted, and -100 is ignored. The sum of the losses is
divided by ``num_items_in_batch`` if given, else by the number of targets. ``token_weights``, of the
labels' shape, multiply the losses of tokens and leave the divisor as it is. No logits are returned.
Without labels, and in ``generate()``, the model works as before. Several threads may call one
model. A deep copy has an objective of its own. A model is detached before it is pickled. A Trainer
that computes a loss from logits (``label_smoothing_factor``, ``compute_loss_func``) never calls
this one.

A router's auxiliary loss is kept where the model would add it (``output_router_logits``), and the
mode does not change it. With ``num_items_in_batch`` it is weighted by this call's share of the
targets, so that micro-batches and ranks add up to its token-weighted mean. (transformers adds it in
full for each micro-batch.) A call without targets adds none. The meters leave it out.
"""

import copy
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from stanford_alpaca.cost import Cost, CostAlias, CostEmbedding, ShardedCost
from stanford_alpaca.losses.backends.sampling import EPSILON, Sampled, Seeds
from stanford_alpaca.losses.functional import (
    check_backend,
    check_head_gradient,
    linear_loss_and_stats,
    sampled_as,
)
from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.losses.own import OwnLoss, try_loss
from stanford_alpaca.losses.types import LossOfStats, SoftTargets
from stanford_alpaca.objective.head import HeadForm, body_of, original_weight, recognise_head
from stanford_alpaca.objective.meter import Meter
from stanford_alpaca.objective.probing import probe_inputs, probing
from stanford_alpaca.objective.teacher import Teacher

# parts of a model's outputs; the cache has another name from transformers 5.24 on
PASSED_ON = ("past_key_values", "cache", "hidden_states", "attentions")


@dataclass
class _Outputs(CausalLMOutputWithPast):
    """What a call with labels returns. The type tells it from another loss."""


@dataclass
class _RoutedOutputs(MoeCausalLMOutputWithPast):
    """The same of a model that adds a router's loss."""


class AttachedObjective:
    """The objective inside a model: ``model.emo_objective``.

    Attributes:
        cost: the frozen CostEmbedding, or this rank's part of it. None without a cost, and with the
            adaptive one.
        teacher: the source of soft targets in training, or None. Evaluation uses the labels.
        sampled: how gradients are sampled; None for exact ones.
        seeds: where these samples' random numbers come from. A trainer sets ``seeds.seed`` and, so
            that a resumed run draws the same, calls ``seeds.at(step)`` before each micro-batch.
        train_meter, eval_meter: sums over the tokens seen with and without gradients.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        form: HeadForm,
        objective: Objective,
        cost: Cost | None,
        adaptive: tuple[str, int] | None,
        backend: str,
        teacher: Teacher | None,
        sampled: Sampled | None,
    ):
        self.teacher, self.sampled, self.seeds = teacher, sampled, Seeds()
        self.form, self.objective, self.backend = form, objective, backend
        self.cost: Cost | None = cost
        # kind and seed of the adaptive cost, which is read from the live output layer at every call
        self.adaptive = adaptive
        self.train_meter, self.eval_meter = Meter(), Meter()
        self._model = model
        self._original = model.forward
        original = self._original.__func__

        def forward(
            model: PreTrainedModel, *args: Any, labels: Tensor | None = None, **kwargs: Any
        ) -> Any:
            if labels is None:
                return original(model, *args, **kwargs)
            return model.emo_objective._forward(model, labels, *args, **kwargs)

        # generate() and the Trainer read the signature; __wrapped__ would let accelerate unwrap us
        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        model.emo_objective = self
        model.forward = MethodType(forward, model)
        self._guard = model.register_forward_hook(check_computed, with_kwargs=True)

    @property
    def has_cost(self) -> bool:
        """Whether emo can be computed. If so, evaluation computes it under every mode."""
        return self.cost is not None or self.adaptive is not None

    def __deepcopy__(self, memo: dict) -> "AttachedObjective":
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model with an attached objective cannot be pickled: call emo_objective.detach() "
            "first, and attach_objective again after loading (copy.deepcopy works)"
        )

    def detach(self) -> None:
        """Restores the model's own forward."""
        self._model.__dict__.pop("forward", None)
        if self._original.__func__ is not type(self._model).forward:
            self._model.forward = self._original  # the instance had been patched before
        self._guard.remove()
        self._model.__dict__.pop("emo_objective", None)

    def _forward(
        self,
        model: PreTrainedModel,
        labels: Tensor,  # [B, S]
        *args: Any,
        num_items_in_batch: Tensor | int | None = None,
        token_weights: Tensor | None = None,  # [B, S] float32, or its bits as int32
        **kwargs: Any,
    ) -> Any:
        own = None
        kwargs.pop("logits_to_keep", None)
        kwargs["return_dict"] = True
        if adds_router_loss(model, kwargs):
            outputs, own = run_with_own_loss(
                self._original.__func__, model, labels, *args, **kwargs
            )
        else:
            outputs = body_of(model)(*args, **kwargs)
        head = self.form.head(model)
        learning = torch.is_grad_enabled()
        if learning and num_items_in_batch is None and isinstance(head.weight, DTensor):
            raise ValueError(
                "a sharded output layer needs num_items_in_batch, the targets of all ranks: "
                "theirs are one loss"
            )
        hidden, targets = outputs[0][:, :-1], labels[:, 1:]
        weights = None if token_weights is None else token_weights.view(torch.float32)[:, 1:]
        soft: SoftTargets | None = None
        if learning and self.teacher is not None:
            keep = targets != -100
            soft = self.teacher.soft_targets(keep, head.weight.shape[0], *args, **kwargs)
            hidden, targets, weights = (
                hidden[keep],
                targets[keep],
                None if weights is None else weights[keep],
            )
        loss, stats = linear_loss_and_stats(
            hidden,
            head,
            targets,
            self._cost(head.weight, learning),
            self.objective,
            soft,
            token_weights=weights,
            backend=self.backend,
            num_items=num_items_in_batch,
            sampled=self._sampled() if learning else None,
        )
        counted = None if weights is None else weights[targets != -100]
        (self.train_meter if learning else self.eval_meter).add(stats, self.objective, counted)
        parts = {name: value for name, value in outputs.items() if name in PASSED_ON}
        if own is None:
            return _Outputs(loss=loss, **parts)
        tokens = stats.nll.shape[0]
        share = tokens / (max(tokens, 1) if num_items_in_batch is None else num_items_in_batch)
        return _RoutedOutputs(
            loss=loss + share * own.loss.to(loss.device), aux_loss=own.get("aux_loss"), **parts
        )

    def _cost(self, weight: Tensor, learning: bool) -> Cost | None:
        if learning and not self.objective.needs_emo:
            return None  # training does not compute costs that the mode does not read
        if self.adaptive is not None:
            return live_cost(weight, *self.adaptive)
        if isinstance(self.cost, CostAlias) and isinstance(weight, DTensor):
            return live_cost(weight, self.cost.kind)
        return self.cost

    def _sampled(self) -> Sampled | None:
        return self.sampled and self.sampled._replace(seed=self.seeds.next())


def live_cost(weight: Tensor, kind: str, seed: int = 0) -> Cost:
    """Returns the cost of the output layer as it is now.

    If the layer is sharded by vocabulary, it is this rank's part of the cost. The kinds shuffled
    and centred depend on the rows of all ranks: one all-gather of V * D numbers.
    """
    if not isinstance(weight, DTensor):
        if kind == "cosine":
            return CostAlias(lambda: weight)
        return CostEmbedding(weight, kind, seed, check_finite=False)
    group = weight.device_mesh.get_group()
    if kind in ("shuffled", "centred"):
        rows = weight.full_tensor().detach()
        whole = CostEmbedding(rows, kind, seed, check_finite=False)
        return ShardedCost(whole, group, weight.device)
    part = CostEmbedding(weight.to_local(), kind, check_finite=False)
    return part if part.rows is None else ShardedCost.of_part(part, weight.shape[0], group)


def check_computed(model: PreTrainedModel, args: tuple, kwargs: dict, outputs: Any) -> None:
    """Raises ValueError if the model was given labels but did not compute the objective.

    It is a hook that runs after the model's forward.
    """
    if kwargs.get("labels") is not None and not isinstance(outputs, _Outputs | _RoutedOutputs):
        raise ValueError(
            "the loss is not that of attach_objective: something has replaced the model's forward "
            "since. TRL's SFTTrainer does (see examples/trl_sft.py), and so does use_liger_kernel "
            "(leave it off)"
        )


def adds_router_loss(model: PreTrainedModel, kwargs: dict) -> bool:
    """Whether the model adds a router's auxiliary loss to its own in this call.

    transformers decides in the same way.
    """
    asked = kwargs.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if asked is None else asked)


def run_with_own_loss(
    forward: Callable, model: PreTrainedModel, labels: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Returns the outputs of the base model and of the whole model, run without targets.

    Cross entropy summed over no target is 0, so the whole model's loss is only what it adds to
    cross entropy. Neither the auxiliary loss nor its coefficient has to be known by name.
    """
    seen, thread = [], threading.get_ident()

    def keep(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        if threading.get_ident() == thread:
            seen.append(outputs)

    hook = body_of(model).register_forward_hook(keep)
    try:
        none = torch.full_like(labels[:, :1], -100)
        own = forward(model, *args, labels=none, logits_to_keep=1, num_items_in_batch=1, **kwargs)
    finally:
        hook.remove()
    if not seen:
        raise ValueError(
            f"{type(model).__name__} does not call its base_model: set output_router_logits=False"
        )
    return seen[0], own


def check_own_loss(model: PreTrainedModel) -> None:
    """Raises ValueError if the model's own loss without targets is not a finite number."""
    with probing(model):
        inputs = probe_inputs(model)
        _, own = run_with_own_loss(
            model.forward.__func__, model, inputs["input_ids"], **inputs, return_dict=True
        )
    if not torch.isfinite(own.loss):
        raise ValueError(
            f"{type(model).__name__} cannot be served with output_router_logits: its own loss "
            f"without targets is {own.loss.item()}, so its router's loss cannot be told from cross "
            "entropy; set output_router_logits=False"
        )


def attach_objective(
    model: PreTrainedModel,
    mode: str | LossOfStats | Objective = "emo",
    cost: str | Tensor | CostEmbedding | None = "frozen",
    *,
    cost_kind: str = "cosine",
    cost_seed: int = 0,
    backend: str = "auto",
    teacher: Teacher | None = None,
    form: HeadForm | None = None,
    head_gradient: str = "exact",
    head_epsilon: float = EPSILON,
    **options: Any,
) -> AttachedObjective:
    """Makes a Hugging Face causal LM compute the objective in its forward, if given ``labels``.

    How the model transforms its logits (a scale, a soft cap) is recognised now, as
    ``recognise_head`` says. The module's docstring says how a call with labels works.

    Args:
        mode: ``mle``, ``emo``, ``emo2``, ... (see ``Objective``), a function of your own, or an
            ``Objective``. A function is tried on the model's device, too.
        cost: ``frozen``, the output embedding as it is now (see ``frozen_cost``); ``adaptive``, the
            live one, detached, at every step; a [V, D] tensor or CostEmbedding of any width; or
            None for modes without emo.
        cost_kind, cost_seed: as in ``CostEmbedding``, which has its own if it is given.
        teacher: gives soft targets in training. The labels then only mark positions that count.
        form: what ``recognise_head`` found on another rank, for a model on the meta device. A
            frozen cost then has rows on the meta device too, until it is shared.
        backend, head_gradient, head_epsilon: as in ``linear_emo_loss``, with the result's seeds.
        options: fields of ``Objective``, e.g. ``emo_weighting="upstream"``.

    Returns:
        The AttachedObjective; its ``detach()`` restores the model.

    Raises:
        ValueError: an unknown mode, cost or backend, a cost of another vocabulary, or a model whose
            logits are not softcap(scale * output layer(last hidden state)).
    """
    if hasattr(model, "emo_objective"):
        raise ValueError("this model has an objective already: detach it first")
    check_backend(backend)
    check_head_gradient(head_gradient, head_epsilon, backend)
    objective = _objective(mode, options, model.device)
    if teacher is not None and objective.needs_p:
        asked = f"mode {objective.name} (weighting {objective.emo_weighting})"
        raise ValueError(f"{asked} needs one target, not a teacher's")
    if form is None:
        form = recognise_head(model)
        if adds_router_loss(model, {}):
            check_own_loss(model)
    adaptive = (cost_kind, cost_seed) if isinstance(cost, str) and cost == "adaptive" else None
    frozen = frozen_cost(model, cost, cost_kind, cost_seed, unit_rows=teacher is not None)
    if frozen is not None:
        frozen.check(form.head(model).weight.shape[0])
    elif adaptive is None and objective.needs_emo:
        raise ValueError(f"mode {objective.name} needs a cost embedding")
    sampled = sampled_as(head_gradient, head_epsilon)
    return AttachedObjective(model, form, objective, frozen, adaptive, backend, teacher, sampled)


def _objective(
    mode: str | LossOfStats | Objective, options: dict[str, Any], device: torch.device
) -> Objective:
    """Returns the objective. A function, which was tried on the CPU, is tried on the device too."""
    if isinstance(mode, Objective) and options:
        raise ValueError("give options in the Objective or by name, not both")
    objective = mode if isinstance(mode, Objective) else Objective(mode, **options)
    if isinstance(objective.mode, OwnLoss) and device.type not in ("cpu", "meta"):
        try_loss(objective.mode.function, objective.mode.name, device)
    return objective


def frozen_cost(
    model: PreTrainedModel,
    cost: str | Tensor | CostEmbedding | None,
    kind: str,
    seed: int,
    *,
    unit_rows: bool,
) -> CostEmbedding | None:
    """Returns the cost that stays as it is now, or None if there is none.

    ``frozen`` copies the output embedding. If nothing trains it (LoRA) and the kind is cosine, the
    embedding itself is read, without what peft puts beside it. See ``attach_objective`` for the
    other values.

    Args:
        unit_rows: whether rows of unit length are needed, as expected costs read them. The
            embedding is then always copied.
    """
    if isinstance(cost, Tensor):
        return CostEmbedding(cost, kind, seed)
    if not isinstance(cost, str):
        return cost
    if cost == "adaptive":
        return None
    if cost != "frozen":
        raise ValueError(f"unknown cost {cost!r}: choose frozen, adaptive or give an embedding")
    original = original_weight(model)
    if kind == "cosine" and not unit_rows and not original.requires_grad:
        return CostAlias(partial(original_weight, model))  # a copy of the model reads its own
    return CostEmbedding(original, kind, seed)
