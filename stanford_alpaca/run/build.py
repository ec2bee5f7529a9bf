"""Builds what a run's flags describe: model, objective, costs, teacher and collator."""

import copy
from typing import Any

import torch
from datasets import Dataset
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.console import say
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.batching import Collator, PadCollator, SegmentCollator, target_counts
from stanford_alpaca.data.sources import ExampleStream
from stanford_alpaca.distributed.store import share_from_rank_0
from stanford_alpaca.distributed.weights import (
    materialize_on_cpu,
    stored_buffers,
    weights_come_from_rank_0,
)
from stanford_alpaca.errors import UserError
from stanford_alpaca.models.load import fit_vocabulary, unread_parts
from stanford_alpaca.models.savable import make_savable
from stanford_alpaca.objective.attach import adds_router_loss, attach_objective
from stanford_alpaca.objective.head import HeadForm, original_weight
from stanford_alpaca.objective.isolation import find_isolation
from stanford_alpaca.objective.teacher import Teacher, same_vocabulary
from stanford_alpaca.run.adapter import adapt, told_adapter
from stanford_alpaca.run.arguments import ObjectiveArguments, Run
from stanford_alpaca.run.model_checks import check_positions


def make_cost(args: ObjectiveArguments) -> CostEmbedding | str:
    """Returns the ``cost`` argument of ``attach_objective``, unless --cost names a model.

    Raises:
        UserError: --cost names no readable embedding.
    """
    if not args.prices_elsewhere or args.cost_is_model:
        return args.cost
    try:
        return CostEmbedding.from_file(args.cost, args.cost_kind, args.cost_seed)
    except Exception as error:  # no such file, not safetensors, or no embedding
        raise UserError(
            f"--cost {args.cost}: not frozen, not adaptive, no model, "
            f"and no embedding in a safetensors file ({error})"
        ) from None


def cost_of_model(
    run: Run, tokenizer: PreTrainedTokenizerBase, vocab_size: int, empty: bool
) -> CostEmbedding:
    """Returns the cost that the output embedding of another model gives to ``vocab_size`` logits.

    It is fitted to the vocabulary as a model that is trained: new rows are the mean of the old
    ones. Rows beyond the vocabulary, padding, are left out.

    Args:
        empty: makes rows on the meta device, and reads no weights.

    Raises:
        UserError: --cost names a model with another vocabulary.
    """
    args, source = run.objective, run.other(run.objective.cost)
    if not same_vocabulary(source.tokenizer(may_grow=False), tokenizer):
        raise UserError(
            f"--cost {args.cost}: its tokenizer has other ids than that of "
            f"{run.model.model_name_or_path}; carry its rows over with "
            "python -m stanford_alpaca.cost build --head MODEL --tokenizer YOURS"
        )
    other = source.empty() if empty else source.load()
    try:
        rows = original_weight(other)
        if empty:
            rows = rows.new_empty(vocab_size, rows.shape[1])
        else:
            fit_vocabulary(other, tokenizer, vocab_size)
            rows = original_weight(other)[:vocab_size]
        return CostEmbedding(rows, args.cost_kind, args.cost_seed)
    except ValueError as error:
        raise UserError(f"--cost {args.cost}: {error}") from None


def make_teacher(run: Run, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    """Returns the teacher that --teacher names, or None. Raises UserError if it does not fit."""
    name = run.model.teacher
    if name is None:
        return None
    source = run.other(name)
    if not same_vocabulary(source.tokenizer(), tokenizer):
        raise UserError(
            f"--teacher {name}: its tokenizer has other ids than that of "
            f"{run.model.model_name_or_path}"
        )
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    model = source.load(dtype)
    check_positions(model, "teacher", run)
    try:
        return Teacher(model, run.model.teacher_top_k)
    except ValueError as error:
        raise UserError(f"--teacher {name}: {error}") from None


def make_model(run: Run, tokenizer: PreTrainedTokenizerBase, with_cost: bool) -> PreTrainedModel:
    """Returns the model with the objective attached.

    If the engine shards the weights, only rank 0 reads weights and costs. The other ranks build
    the architecture without weights. They receive the form of the head, the generation
    configuration and the stored buffers from rank 0.

    Raises:
        UserError: the model, its objective or its teacher cannot be used.
    """
    training = run.training
    if not weights_come_from_rank_0(training):
        return build_model(run, tokenizer, with_cost)
    models = []

    def read() -> tuple:
        models.append(build_model(run, tokenizer, with_cost))
        return models[0].emo_objective.form, models[0].generation_config, stored_buffers(models[0])

    if training.process_index == 0:
        share_from_rank_0("model", read)
        return models[0]
    found: tuple = share_from_rank_0("model", None)
    form, generation_config, buffers = found
    model = build_model(run, tokenizer, with_cost, form)
    model.generation_config = generation_config
    model.load_state_dict(buffers, strict=False)
    # DeepSpeed takes no meta tensors, and accelerate tells parameters apart by their addresses.
    materialize_on_cpu(model)
    return model


def build_model(
    run: Run, tokenizer: PreTrainedTokenizerBase, with_cost: bool, form: HeadForm | None = None
) -> PreTrainedModel:
    """Returns the model with the objective attached; with a ``form``, on the meta device."""
    model_args, objective_args = run.model, run.objective
    objective, cost = objective_args.objective(), make_cost(objective_args)
    options, source = precision(run), run.source
    model = source.load(**options) if form is None else copy.deepcopy(source.empty(**options))
    fit_vocabulary(model, tokenizer)
    priced = with_cost or objective.needs_emo
    if priced and objective_args.cost_is_model:
        rows = model.get_input_embeddings().weight.shape[0]
        cost = cost_of_model(run, tokenizer, rows, empty=form is not None)
    make_savable(model, tokenizer, model_args.model_name_or_path)
    teacher = make_teacher(run, tokenizer)
    freeze_unread(model, model_args.model_name_or_path)
    adapted = adapt(model, run.lora) if run.lora.lora else model
    if run.lora.lora:
        say(told_adapter(adapted))
    try:
        attach_objective(
            model,
            objective,
            cost if priced else None,
            cost_kind=objective_args.cost_kind,
            cost_seed=objective_args.cost_seed,
            backend=objective_args.loss_backend,
            teacher=teacher,
            form=form,
            head_gradient=objective_args.head_gradient,
            head_epsilon=objective_args.head_epsilon,
        )
    except ValueError as error:
        if run.lora.qlora and "cannot be probed" in str(error):
            raise UserError(
                f"--qlora: bitsandbytes cannot compute with layers of this model's widths ({error})"
            ) from None
        raise UserError(str(error)) from None
    return adapted


def freeze_unread(model: PreTrainedModel, name: str) -> None:
    """Freezes parameters that text does not pass through, because they would get no gradient.

    Prints how many they are.
    """
    unread = unread_parts(model)
    if unread:
        parameters = dict(model.named_parameters())
        for each in unread:
            parameters[each].requires_grad_(False)
        parts = dict.fromkeys(each.removeprefix("model.").partition(".")[0] for each in unread)
        count = sum(parameters[each].numel() for each in unread)
        say(
            f"{name}: trained as a model of text; "
            f"{count:,} parameters stay as they are ({', '.join(parts)})"
        )


def precision(run: Run) -> dict[str, Any]:
    """Returns the options of ``ModelSource.load`` that decide how weights are stored.

    Weights are float32 masters. If LoRA trains none of the model's own weights, they have the
    dtype of the computation instead, which is bfloat16 with --bf16. With --qlora all linear layers
    but the output layer are in 4 bits (QLoRA, arXiv 2305.14314).
    """
    computed = torch.bfloat16 if run.training.bf16 else torch.float32
    frozen = run.lora.lora and run.lora.lora_embeddings != "full"
    options: dict[str, Any] = {"dtype": computed if frozen else torch.float32}
    if run.lora.qlora:
        options["device_map"] = {"": run.training.device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computed,
        )
    return options


def make_collator(run: Run, model: PreTrainedModel, pad_id: int) -> Collator:
    """Returns the collator of the training and evaluation batches.

    By default it pads and masks. With --packing or --padding_free it makes no padding mask; the
    model then has to keep the examples of one row apart, and a probe finds out how. If only rank 0
    has the weights, it runs the probe and tells the others.

    Raises:
        UserError: the model cannot keep the examples of one row apart.
    """
    packing, flat = run.data.packing, run.data.padding_free
    if not packing and not flat:
        return PadCollator(pad_id)

    def probe() -> str:
        means = find_isolation(model)
        teacher = model.emo_objective.teacher
        if teacher is not None:
            find_isolation(teacher.model, "teacher", means)
        return means

    if weights_come_from_rank_0(run.training):  # the other ranks have no weights to probe
        means = share_from_rank_0("isolation", probe if run.training.process_index == 0 else None)
    else:
        means = probe()
    if adds_router_loss(model, {}) and not flat:
        raise UserError(
            "--packing: the router's loss of this model would count the padding of rows; "
            "add --padding_free"
        )
    return SegmentCollator(pad_id, flat, apart_by=means)


def cache_costs(cost: CostEmbedding | None, run: Run, examples: Dataset | ExampleStream) -> None:
    """Makes a frozen cost keep its rows from step to step, within --cost_cache_mib.

    Raises:
        UserError: the budget holds not even one row.
    """
    mib, training = run.objective.cost_cache_mib, run.training
    if mib is None:
        # Otherwise only evaluation reads cost rows.
        every_step = run.objective.objective().needs_emo and run.model.teacher is None
        mib = (
            2048
            if every_step and torch.cuda.is_available() and (training.bf16 or training.fp16)
            else 0
        )
    if cost is None or cost.rows is None or not mib:
        return
    vocab_size, counts = len(cost.rows), None
    # If not all bfloat16 rows fit, the rows of the most frequent targets are kept.
    if 2 * vocab_size**2 > mib * 2**20 and isinstance(examples, Dataset):
        counts = target_counts(examples, vocab_size)
    try:
        cost.cache(mib, counts)
    except ValueError as error:
        raise UserError(f"--cost_cache_mib: {error}") from None
