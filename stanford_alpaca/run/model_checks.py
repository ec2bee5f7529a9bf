"""Checks that model, tokenizer, flags and disk fit together, on the model without its weights."""

import copy
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames

from stanford_alpaca.checkpoint.space import check_space, checkpoint_bytes
from stanford_alpaca.console import say
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.distributed.weights import loading_whole
from stanford_alpaca.errors import UserError
from stanford_alpaca.generation.prompts import encode_prompts
from stanford_alpaca.run.adapter import adapt
from stanford_alpaca.run.arguments import Run
from stanford_alpaca.training.fsdp import layer_classes


def check_fit(run: Run, tokenizer: PreTrainedTokenizerBase, prompts: list[dict]) -> None:
    """Raises UserError for the first thing that does not fit.

    Builds the model once on the meta device and reads no weights.
    """
    training = run.training
    with loading_whole(training):  # otherwise transformers would allocate it under ZeRO-3
        model = run.source.empty()
    if training.fsdp:
        layer_classes(model, dict(training.fsdp_config or {}).get("transformer_layer_cls_to_wrap"))
    check_positions(model, "model", run)
    check_vocabulary(model, tokenizer, run)
    encode = PromptEncoder(tokenizer, run.data.prompt_template, run.data.special_tokens)
    encode_prompts(model.config, encode, prompts, training.sample_max_new_tokens)
    trained = trained_parameters(model, run)
    if training.save_strategy != "no":
        size = checkpoint_bytes(
            trained, OptimizerNames(training.optim).value, training.save_only_model
        )
        check_space(Path(training.output_dir), 2 * size, "room for two checkpoints")


def check_positions(model: PreTrainedModel, name: str, run: Run) -> None:
    """Raises UserError if examples may have more tokens than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    flag, length = (
        "block_size" if run.data.block_size else "model_max_length",
        run.training.model_max_length,
    )
    if positions is not None and length > positions:
        raise UserError(
            f"--{flag} {length} is more than the {name}'s {positions} positions; give at most that"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Raises UserError for another model's tokenizer, and for new tokens that LoRA would not train.

    Prints by how many rows the embedding is going to grow.
    """
    path, rows = run.model.model_name_or_path, model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {rows} rows: "
            "that is another model's tokenizer; put the model's own one there"
        )
    added = len(tokenizer) - rows
    if added > 0 and not run.lora.may_grow:
        raise UserError(
            f"--lora trains no embedding, and {added} of the tokenizer's tokens have none: "
            "add --lora_embeddings full, or drop --lora"
        )
    if added > 0:
        say(
            f"{path}: the embedding grows from {rows} rows to the tokenizer's {len(tokenizer)}, "
            "new ones the mean of the old"
        )


def trained_parameters(model: PreTrainedModel, run: Run) -> int:
    """Returns how many parameters are trained. Raises UserError for LoRA targets no layer has."""
    if not run.lora.lora:
        return sum(p.numel() for p in model.parameters())
    return sum(
        p.numel() for p in adapt(copy.deepcopy(model), run.lora).parameters() if p.requires_grad
    )
