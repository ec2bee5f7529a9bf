"""Where the cost embedding lives: whole on every rank, in parts that are gathered for the loss, or beside the head's parts.

The frozen cost is no parameter: nothing trains, decays or saves it. It is made of the base model before anything is wrapped,
also when a run resumes. Where the output layer is not trained (LoRA) the cost is the layer itself, and takes nothing.

| --cost_sharding | a rank keeps | collectives of a micro-batch, beside the engine's own |
|---|---|---|
| replicate | V * D numbers, float32 | none |
| shard | 1 / R of them | one all-gather of all, before the loss; released after it |
| vocab_parallel | 1 / R of them, and of the output layer | in losses/backends/vocab_parallel.py; the head is never gathered |
"""

from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments

from stanford_alpaca.cost import CostAlias, ShardedCost, broadcast_cost
from stanford_alpaca.distributed.engine import shards_weights
from stanford_alpaca.distributed.weights import weights_come_from_rank_0
from stanford_alpaca.errors import UserError
from stanford_alpaca.objective.attach import adds_router_loss

PLACES = ("replicate", "shard", "vocab_parallel")  # of the frozen costs
COST_SHARDINGS = ("auto", *PLACES)
AUTO_SHARD_BYTES = 2**30  # auto shards larger embeddings where the engine shards the model


class VocabParallelLinear(nn.Linear):
    """An output layer that FSDP2 keeps as a unit of its own: the loss reads its shard and never calls it."""


def shard_cost(model: PreTrainedModel, asked: str, training: TrainingArguments) -> str:
    """Cuts the attached model's cost, and for vocab_parallel prepares its output layer; returns what was chosen.

    Raises:
        UserError: what was asked for cannot be had with this model, objective or engine.
    """
    emo = model.emo_objective
    if isinstance(
        emo.cost, CostAlias
    ):  # it lives where the output layer does, as whole or as sharded
        if asked == "vocab_parallel":
            _separate_output_layer(model, training)
        return "replicate" if asked == "auto" else asked
    embedding = emo.cost if emo.cost is not None and emo.cost.rows is not None else None
    if asked == "auto":
        large = embedding is not None and embedding.rows.nbytes > AUTO_SHARD_BYTES
        asked = (
            "shard"
            if large and shards_weights(training) and training.world_size > 1
            else "replicate"
        )
    one_has_it = weights_come_from_rank_0(training)
    if asked == "replicate":
        if one_has_it and embedding is not None:
            emo.cost = broadcast_cost(embedding, training.device)
        return asked
    if asked == "shard" and embedding is None:
        raise UserError(
            "--cost_sharding shard: there is no frozen cosine cost to shard here; drop the flag"
        )
    if asked == "vocab_parallel":
        _separate_output_layer(model, training)
    if embedding is not None:
        emo.cost = ShardedCost(embedding, device=training.device, from_rank_0=one_has_it)
    return asked


def _separate_output_layer(model: PreTrainedModel, training: TrainingArguments) -> None:
    """Makes the output layer a VocabParallelLinear, with the same parameters under the same names."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            "--cost_sharding vocab_parallel needs a plain output layer: leave --lora_embeddings frozen, or use shard"
        )
    if layer.weight is model.get_input_embeddings().weight:
        raise UserError(
            "--cost_sharding vocab_parallel needs an output layer of its own, and this model's is tied; use shard"
        )
    if layer.weight.shape[0] <= -(-layer.weight.shape[0] // training.world_size) * (
        training.world_size - 1
    ):
        raise UserError(
            f"--cost_sharding vocab_parallel: {training.world_size} processes are too many for this vocabulary"
        )
    if adds_router_loss(model, {}):
        raise UserError(
            "--cost_sharding vocab_parallel: the router's loss of this model is computed with its output layer; use shard"
        )
    separate = VocabParallelLinear(1, 1, bias=layer.bias is not None, device="meta")
    separate.in_features, separate.out_features = layer.in_features, layer.out_features
    separate.weight, separate.bias = layer.weight, layer.bias
    separate.train(layer.training)
    model.set_output_embeddings(separate)


def wrap_separately(model: PreTrainedModel, plugin: Any) -> None:
    """Tells accelerate's FSDP2 plugin to make the VocabParallelLinear a unit, beside the decoder layers."""
    if isinstance(model.get_output_embeddings(), VocabParallelLinear):
        plugin.transformer_cls_names_to_wrap = [
            *plugin.transformer_cls_names_to_wrap,
            VocabParallelLinear.__name__,
        ]


def check_separate(model: PreTrainedModel) -> None:
    """Raises UserError if the output layer was to stay sharded and is not. Before the first step of a wrapped model."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, VocabParallelLinear):
        return
    if not isinstance(layer, FSDPModule):
        raise UserError(
            "--cost_sharding vocab_parallel was asked for, but FSDP did not take the output layer as a unit"
        )
    for group in (
        layer._get_fsdp_state()._fsdp_param_groups
    ):  # its gradients come reduced, past FSDP, which would look for
        group.mp_policy = replace(
            group.mp_policy, reduce_dtype=None
        )  # unsharded ones to sum up in that precision
        for parameter in group.fsdp_params:
            parameter.mp_policy = replace(parameter.mp_policy, reduce_dtype=None)
