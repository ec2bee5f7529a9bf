"""Where the cost embedding lives: whole on every rank, sharded, or sharded together with the head.

The frozen cost is not a parameter: nothing trains, decays or saves it. It is made from the base
model before an engine wraps the model, also when a run resumes. If the output layer is not trained
(LoRA), the cost is the layer itself and takes no memory.

| --cost_sharding | each of R ranks keeps | collectives of a micro-batch, beside the engine's own |
|---|---|---|
| replicate | V * D numbers, float32 | none |
| shard | 1 / R of them | one all-gather of all before the loss; freed after it |
| vocab_parallel | 1 / R of them and of the head | see losses/backends/vocab_parallel.py |

With vocab_parallel the head (the output layer) is never gathered.
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

PLACES = ("replicate", "shard", "vocab_parallel")  # where the frozen costs may live
COST_SHARDINGS = ("auto", *PLACES)
AUTO_SHARD_BYTES = 2**30  # auto shards larger embeddings where the engine shards the model


class VocabParallelLinear(nn.Linear):
    """An output layer that is an FSDP2 unit by itself: the loss reads its shard, never calls it."""


def shard_cost(model: PreTrainedModel, asked: str, training: TrainingArguments) -> str:
    """Shards the attached model's cost as asked; vocab_parallel also prepares the output layer.

    Returns:
        The sharding that was chosen.

    Raises:
        UserError: this model, objective or engine does not allow what was asked.
    """
    emo = model.emo_objective
    # A CostAlias lives where the output layer does, whole or sharded.
    if isinstance(emo.cost, CostAlias):
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
            "--cost_sharding shard: there are no frozen cost rows to shard here; drop the flag"
        )
    if asked == "vocab_parallel":
        _separate_output_layer(model, training)
    if embedding is not None:
        emo.cost = ShardedCost(embedding, device=training.device, from_rank_0=one_has_it)
    return asked


def _separate_output_layer(model: PreTrainedModel, training: TrainingArguments) -> None:
    """Replaces the output layer by a VocabParallelLinear with the same parameters and names."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            "--cost_sharding vocab_parallel needs a plain output layer: "
            "leave --lora_embeddings frozen, or use shard"
        )
    if layer.weight is model.get_input_embeddings().weight:
        raise UserError(
            "--cost_sharding vocab_parallel needs an output layer of its own, "
            "and this model's is tied; use shard"
        )
    if layer.weight.shape[0] <= -(-layer.weight.shape[0] // training.world_size) * (
        training.world_size - 1
    ):
        raise UserError(
            "--cost_sharding vocab_parallel: "
            f"{training.world_size} processes are too many for this vocabulary"
        )
    if adds_router_loss(model, {}):
        raise UserError(
            "--cost_sharding vocab_parallel: the router's loss of this model is computed with its "
            "output layer; use shard"
        )
    separate = VocabParallelLinear(1, 1, bias=layer.bias is not None, device="meta")
    separate.in_features, separate.out_features = layer.in_features, layer.out_features
    separate.weight, separate.bias = layer.weight, layer.bias
    separate.train(layer.training)
    model.set_output_embeddings(separate)


def wrap_separately(model: PreTrainedModel, plugin: Any) -> None:
    """Tells accelerate's FSDP2 plugin to make the VocabParallelLinear a unit of its own."""
    if isinstance(model.get_output_embeddings(), VocabParallelLinear):
        plugin.transformer_cls_names_to_wrap = [
            *plugin.transformer_cls_names_to_wrap,
            VocabParallelLinear.__name__,
        ]


def check_separate(model: PreTrainedModel) -> None:
    """Raises UserError if the output layer should be an FSDP unit of its own and is not.

    To be called on the wrapped model before its first step.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, VocabParallelLinear):
        return
    if not isinstance(layer, FSDPModule):
        raise UserError(
            "--cost_sharding vocab_parallel was asked for, "
            "but FSDP did not take the output layer as a unit"
        )
    # The loss hands over gradients that are already reduced, past FSDP. With a reduce_dtype, FSDP
    # would look for unsharded gradients to accumulate in that precision.
    state = layer._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch 2.11 has one
        groups = filter(None, [state._fsdp_param_group])
    for group in groups:
        group.mp_policy = replace(group.mp_policy, reduce_dtype=None)
        for parameter in group.fsdp_params:
            parameter.mp_policy = replace(parameter.mp_policy, reduce_dtype=None)
