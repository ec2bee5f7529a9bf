"""The summary of a run before its first step: one screen."""

import torch
from transformers import PreTrainedModel

from stanford_alpaca.checkpoint.space import MIB
from stanford_alpaca.console import say
from stanford_alpaca.cost import CostAlias
from stanford_alpaca.data.templates import IN_WORDS, trained_prompts
from stanford_alpaca.distributed.engine import deepspeed_of
from stanford_alpaca.run.arguments import Run
from stanford_alpaca.run.model_card import unit_of
from stanford_alpaca.training.trainer import EmoTrainer

FEW = 10  # optimizer steps that hardly train a model
LOWER = "lower --global_batch, or raise --num_train_epochs"


def rows(run: Run, trainer: EmoTrainer, sharding: str, examples: int | None) -> dict[str, str]:
    """Returns what the summary says, in order.

    Args:
        sharding: where the frozen costs are, as ``shard_cost`` has chosen.
        examples: how many are trained on, None for a stream.
    """
    args, model = run.training, trainer.accelerator.unwrap_model(trainer.model)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    unit = unit_of(run)
    prompts = trained_prompts(trainer.processing_class)
    said = {
        "model": f"{run.model.model_name_or_path}, {_parameters(model)}",
        "objective": f"{run.objective.name}, {_cost(run, model, sharding)}",
        "data": _data(run, trainer, unit, examples),
        "prompts": IN_WORDS[prompts.template] if prompts else "none: running text",
        "batch": f"{batch} {unit} a step: {args.per_device_train_batch_size} on each of "
        f"{args.world_size} process(es), {args.gradient_accumulation_steps} micro-batch(es)",
        "engine": f"{_engine(run)}, {_precision(run)}",
        "output": str(args.output_dir),
    }
    return said


def show(run: Run, trainer: EmoTrainer, sharding: str, examples: int | None) -> None:
    """Prints the summary."""
    for name, value in rows(run, trainer, sharding, examples).items():
        say(f"{name:<11}{value}")


def _parameters(model: PreTrainedModel) -> str:
    total = sum(_size(parameter) for parameter in model.parameters())
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    return f"{trained:,} of {total:,} parameters are trained"


def _size(parameter: torch.Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3's is empty here


def _cost(run: Run, model: PreTrainedModel, sharding: str) -> str:
    emo = getattr(model, "emo_objective", None) or model.get_base_model().emo_objective
    if not run.objective.objective().needs_emo:
        return "no costs"
    if run.objective.cost_kind == "identity":
        return "every wrong token costs 1"
    kind = f"{run.objective.cost} {run.objective.cost_kind} costs"
    if emo.adaptive is not None:
        return f"{kind} of the live output layer"
    if isinstance(emo.cost, CostAlias):
        return f"{kind} in the frozen output layer, no copy"
    size = 0 if emo.cost is None or emo.cost.rows is None else emo.cost.rows.nbytes / MIB
    return f"{kind}, {sharding}, {size:,.0f} MiB a process"


def _data(run: Run, trainer: EmoTrainer, unit: str, count: int | None) -> str:
    args, steps = run.training, trainer.args.max_steps
    if count is None:
        return f"a stream, {steps:,} steps"
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    few = ""
    if steps <= 0:
        steps = -(-count // per_step) * args.num_train_epochs
        few = f", which are few: {LOWER}" if steps < FEW and per_step > 1 else ""
    held = f", {len(trainer.eval_dataset):,} held out" if trainer.eval_dataset is not None else ""
    return f"{count:,} {unit}{held}, {steps:,.0f} steps{few}"


def _engine(run: Run) -> str:
    args = run.training
    if args.engine:
        return args.engine
    if args.fsdp:
        return "fsdp"
    if (config := deepspeed_of(args)) is not None:
        return f"zero{config.get_value('zero_optimization.stage', 0)}"
    return "none" if args.world_size == 1 else "ddp"


def _precision(run: Run) -> str:
    args = run.training
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return f"{computed} on {args.device.type}"
