"""What a run's flags make: the model with its objective, its costs and teacher, the collator."""

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
from stanford_alpaca.objective.head import HeadForm
from stanford_alpaca.objective.isolation import find_isolation
from stanford_alpaca.objective.teacher import Teacher, same_vocabulary
from stanford_alpaca.run.adapter import adapt, told_adapter
from stanford_alpaca.run.arguments import ObjectiveArguments, Run
from stanford_alpaca.run.model_checks import check_positions


def make_cost(args: ObjectiveArguments) -> CostEmbedding | str:
    """What ``attach_objective`` takes as its cost."""
    if args.cost in ("frozen", "adaptive"):
        return args.cost
    if args.cost_kind == "identity":
        raise UserError(
            f"--cost {args.cost} would not be used: --cost_kind identity needs no embedding"
        )
    try:
        return CostEmbedding.from_file(args.cost, args.cost_kind)
    except Exception as error:  # no such file, no safetensors, no embedding
        raise UserError(
            f"--cost {args.cost}: not frozen, not adaptive, and no embedding in a safetensors file ({error})"
        ) from None


def make_teacher(run: Run, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    """The teacher that --teacher names. Raises UserError for one that does not fit."""
    name = run.model.teacher
    if name is None:
        return None
    source = run.teacher(name)
    if not same_vocabulary(source.tokenizer(), tokenizer):
        raise UserError(
            f"--teacher {name}: its tokenizer has other ids than that of {run.model.model_name_or_path}"
        )
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    model = source.load(dtype)
    check_positions(model, "teacher", run)
    try:
        return Teacher(model, run.model.teacher_top_k)
    except ValueError as error:
        raise UserError(f"--teacher {name}: {error}") from None


def make_model(run: Run, tokenizer: PreTrainedTokenizerBase, with_cost: bool) -> PreTrainedModel:
    """The model with the objective in it. Raises UserError for one that cannot be served.

    Where the engine shards, rank 0 alone has its weights and costs. The others have its architecture, and get from rank 0 the
    form of its head, how it generates, and its stored buffers.
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
    materialize_on_cpu(
        model
    )  # DeepSpeed takes no meta tensors, and accelerate tells parameters apart by their addresses
    return model


def build_model(
    run: Run, tokenizer: PreTrainedTokenizerBase, with_cost: bool, form: HeadForm | None = None
) -> PreTrainedModel:
    """The model with the objective in it; with a ``form``, on the meta device."""
    model_args, objective_args = run.model, run.objective
    objective, cost = objective_args.objective(), make_cost(objective_args)
    options, source = precision(run), run.source
    model = source.load(**options) if form is None else copy.deepcopy(source.empty(**options))
    fit_vocabulary(model, tokenizer)
    make_savable(model, tokenizer, model_args.model_name_or_path)
    teacher = make_teacher(run, tokenizer)
    freeze_unread(model, model_args.model_name_or_path)
    adapted = adapt(model, run.lora) if run.lora.lora else model
    if run.lora.lora:
        say(told_adapter(adapted))
    try:
        attach_objective(
            model, objective, cost if with_cost or objective.needs_emo else None,
            cost_kind=objective_args.cost_kind, backend=objective_args.loss_backend, teacher=teacher, form=form,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    return adapted


def freeze_unread(model: PreTrainedModel, name: str) -> None:
    """Leaves what text does not pass through as it is, and says so: it would get no gradient."""
    unread = unread_parts(model)
    if unread:
        parameters = dict(model.named_parameters())
        for each in unread:
            parameters[each].requires_grad_(False)
        parts = dict.fromkeys(each.removeprefix("model.").partition(".")[0] for each in unread)
        count = sum(parameters[each].numel() for each in unread)
        say(
            f"{name}: trained as a model of text; {count:,} parameters stay as they are ({', '.join(parts)})"
        )


def precision(run: Run) -> dict[str, Any]:
    """How ``ModelSource.load`` keeps the weights: as float32 masters, or where LoRA trains none of them as what --bf16 computes with.

    With --qlora linear layers but the output are in 4 bits (QLoRA, arXiv 2305.14314).
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
    """Pads and masks, or with --packing and --padding_free neither. Raises UserError for a model that needs the mask.

    Where rank 0 alone has the weights, it tells the others.
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

    if weights_come_from_rank_0(run.training):  # the others have no weights to probe
        means = share_from_rank_0("isolation", probe if run.training.process_index == 0 else None)
    else:
        means = probe()
    if adds_router_loss(model, {}) and not flat:
        raise UserError(
            "--packing: the router's loss of this model would count the padding of rows; add --padding_free"
        )
    return SegmentCollator(pad_id, flat, apart_by=means)


def cache_costs(cost: CostEmbedding | None, run: Run, examples: Dataset | ExampleStream) -> None:
    """Keeps rows of a frozen cost from step to step, within --cost_cache_mib."""
    mib, training = run.objective.cost_cache_mib, run.training
    if mib is None:
        every_step = (
            run.objective.objective().needs_emo and run.model.teacher is None
        )  # else evaluation alone reads rows
        mib = (
            2048
            if every_step and torch.cuda.is_available() and (training.bf16 or training.fp16)
            else 0
        )
    if cost is None or cost.rows is None or not mib:
        return
    vocab_size, counts = len(cost.rows), None
    if 2 * vocab_size**2 > mib * 2**20 and isinstance(
        examples, Dataset
    ):  # not all rows: the most frequent targets'
        counts = target_counts(examples, vocab_size)
    try:
        cost.cache(mib, counts)
    except ValueError as error:
        raise UserError(f"--cost_cache_mib: {error}") from None
