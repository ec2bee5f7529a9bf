"""Checks of a run's flags, made before anything is loaded or written."""

import importlib.util
import math
import os
from dataclasses import fields
from inspect import signature
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import OptimizerNames

from stanford_alpaca.checkpoint.manifest import checkpoints
from stanford_alpaca.console import quiet_hub, say
from stanford_alpaca.distributed.engine import deepspeed_of, shards_weights
from stanford_alpaca.errors import UserError, first_line, nearest
from stanford_alpaca.flags import MOST, MOST_SEED, RECORD_LIMIT, check_writable
from stanford_alpaca.losses.functional import check_head_gradient
from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.losses.own import COPY, try_loss
from stanford_alpaca.models.check import check_model
from stanford_alpaca.run.arguments import (
    FLAGS,
    METRICS,
    DataArguments,
    LoraArguments,
    ModelArguments,
    ObjectiveArguments,
    Run,
    TrainingArguments,
    defaults,
)
from stanford_alpaca.run.lock import LOCK_FILE
from stanford_alpaca.run.resolve import accumulation_of, asked_checkpoint
from stanford_alpaca.run.trainer_flags import check_flags, check_optimizer_flags

FROM_ZERO = (  # flags that take 0 or more
    "seed", "data_seed", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps",
    "eval_delay", "neftune_noise_alpha", "dataloader_num_workers", "skip_nonfinite",
)  # fmt: skip
MOST_OF = {  # flag -> the greatest value it takes, where that is not MOST
    "seed": 2**32 - 1,  # numpy's
    "data_seed": 2**32 - 1,
    "cost_seed": MOST_SEED,
    "dataloader_num_workers": 4096,
    "preprocessing_num_workers": 4096,
}
FLASH = {  # attention implementation -> the package it needs
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}
ABOVE_ZERO = (  # flags that take more than 0
    "learning_rate", "num_train_epochs", "logging_steps", "save_steps", "save_total_limit",
    "eval_steps", "sample_steps", "sample_max_new_tokens",
)  # fmt: skip


def check(run: Run) -> None:
    """Raises UserError for the first flag, or combination of flags, that cannot work."""
    model, data, lora, training = run.model, run.data, run.lora, run.training
    check_output(training)
    check_sizes(run)
    check_batches(training)
    check_data(data, training)
    check_flags(training, defaults(TrainingArguments))
    check_numbers(training)
    check_optimizer(training)
    check_training(training, has_eval=data.eval_path is not None or data.eval_fraction is not None)
    check_own_loss(run.objective, training)
    check_objective(model, run.objective)
    for line in unused_flags(run):
        say(line)
    check_cost_sharding(run)
    check_lora(model, lora, training)
    check_attention(model.attn_implementation)
    check_model(run.source, weights=not model.from_config)
    if getattr(run.source.config(), "quantization_config", None) is not None and not (
        lora.lora or model.from_config
    ):
        raise UserError(
            f"{model.model_name_or_path}: quantized weights cannot be trained; "
            "train an adapter with --lora"
        )
    if model.teacher is not None:
        check_model(run.other(model.teacher))
    if run.objective.cost_is_model:
        try:
            check_model(run.other(run.objective.cost))
        except UserError as error:
            raise UserError(
                f"--cost {run.objective.cost}: not frozen, not adaptive, no file, and no model "
                f"({error})"
            ) from None
    if training.push_to_hub:
        check_hub(training)


def check_attention(name: str | None) -> None:
    """Raises UserError unless transformers has this attention implementation and it can run here.

    A name with a slash is a kernel on the hub. It is not checked.
    """
    known = sorted(
        {"eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)}
    )
    if name is None or "/" in name:
        return
    if name not in known:
        raise UserError(
            f"--attn_implementation {name}: choose from {', '.join(known)}{nearest(name, known)}"
        )
    package = FLASH.get(name)
    if package is None:
        return
    if not torch.cuda.is_available():
        raise UserError(f"--attn_implementation {name} needs an NVIDIA GPU: choose sdpa")
    if all(importlib.util.find_spec(each) is None for each in (package, "kernels")):
        raise UserError(
            f"--attn_implementation {name} needs a package, {package} or kernels: "
            "pip install kernels, or choose sdpa"
        )


def check_numbers(training: TrainingArguments) -> None:
    """Raises UserError for a number out of the range of its flag. NaN is always out of range."""
    for name in (*FROM_ZERO, *ABOVE_ZERO):
        value = getattr(training, name)
        if value is None or 0 < value < math.inf or (value == 0 and name in FROM_ZERO):
            continue
        raise UserError(
            f"--{name} {value}: give {'0 or more' if name in FROM_ZERO else 'a number above 0'}"
        )
    if training.max_steps != -1 and training.max_steps < 1:
        raise UserError(
            f"--max_steps {training.max_steps}: give 1 or more, "
            "or leave it out and --num_train_epochs counts"
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, name) < 1:
            raise UserError(
                f"--{name} {getattr(training, name)}: give a number from 0 on and below 1"
            )


def check_sizes(run: Run) -> None:
    """Raises UserError for a number that is larger than any run needs, or not finite.

    Such a number would end in an overflow, or in a list that no memory holds, once files have been
    written.
    """
    for part in (run.model, run.data, run.objective, run.lora, run.training):
        for name in (field.name for field in fields(part)):  # type: ignore[arg-type]
            value, most = getattr(part, name), MOST_OF.get(name, MOST)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isnan(value) and name in (*FROM_ZERO, *ABOVE_ZERO):
                continue  # ``check_numbers`` says what is wanted
            if not -most <= value <= most:
                bound = "" if math.isnan(value) else f" of at most {most:,}"
                raise UserError(f"--{name} {value}: give a number{bound}")
    workers = run.data.preprocessing_num_workers
    if workers is not None and workers < 0:
        raise UserError(f"--preprocessing_num_workers {workers}: give 1 or more")


def check_optimizer(training: TrainingArguments) -> None:
    """Raises UserError if no optimizer or learning-rate schedule can be made from the flags.

    The Trainer would find out only after files have been written.
    """
    try:
        check_optimizer_flags(training)
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(
            f"--optim {OptimizerNames(training.optim).value}: {first_line(error)}"
        ) from None
    trial = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    name = training.lr_scheduler_type.value
    try:
        get_scheduler(name, trial, 1, 2, training.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--lr_scheduler_type {name}, --lr_scheduler_kwargs: {first_line(error)}"
        ) from None
    warms_up = (
        "num_warmup_steps"
        in signature(TYPE_TO_SCHEDULER_FUNCTION[training.lr_scheduler_type]).parameters
    )
    if training.warmup_steps and not warms_up:
        say(
            f"--warmup_steps {training.warmup_steps:g} changes nothing "
            f"with --lr_scheduler_type {name}"
        )


def check_training(training: TrainingArguments, has_eval: bool) -> None:
    """Raises UserError for Trainer flags that are invalid, or exclude or need each other."""
    if training.eval_strategy != "no" and not has_eval:
        raise UserError(
            f"--eval_strategy {training.eval_strategy.value} needs --eval_path or --eval_fraction"
        )
    if training.balance_lengths and training.train_sampling_strategy not in (
        "random",
        "sequential",
    ):
        raise UserError(
            f"--balance_lengths and --train_sampling_strategy {training.train_sampling_strategy}: "
            "choose one"
        )
    if training.sample_prompts is None and training.sample_steps is not None:
        raise UserError("--sample_steps needs --sample_prompts FILE")
    metric, saves_best = training.metric_for_best_model, training.save_strategy == "best"
    if saves_best and metric is None:
        raise UserError("--save_strategy best needs --metric_for_best_model")
    if (saves_best or training.load_best_model_at_end) and training.eval_strategy == "no":
        raise UserError(
            "--load_best_model_at_end and --save_strategy best need an --eval_strategy "
            "to find the best"
        )
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        near = nearest(metric.removeprefix("eval_"), list(METRICS))
        raise UserError(f"--metric_for_best_model {metric}: choose from {', '.join(METRICS)}{near}")
    try:
        for tracker in get_reporting_integration_callbacks(training.report_to):
            tracker()  # raises if its package is missing
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"--report_to: {error}") from None


def check_own_loss(objective: ObjectiveArguments, training: TrainingArguments) -> None:
    """Raises UserError if --loss names no loss that can be trained, on the device of the run.

    Runs the file, and says so.
    """
    own = objective.own
    if own is None:
        return
    try:
        try_loss(own.function, own.name, training.device)
    except ValueError as error:
        raise UserError(f"--loss {objective.loss}, on {training.device}: {error}") from None
    say(
        f"--loss {objective.loss}: the code of this file runs with your rights; "
        f"the run keeps a copy, {COPY}"
    )


def check_objective(model: ModelArguments, objective: ObjectiveArguments) -> None:
    """Raises UserError if the objective's flags are invalid, or do not fit costs or teacher."""
    needs = objective.objective()
    if model.from_config and needs.needs_emo and objective.asks_the_model:
        raise UserError(
            f"--from_config with mode {needs.name}: a random output layer prices nothing; "
            "make a cost embedding with "
            "python -m stanford_alpaca.cost build and give it as --cost PATH"
        )
    if objective.prices_elsewhere and objective.cost_kind == "identity":
        raise UserError(
            f"--cost {objective.cost} would not be used: --cost_kind identity needs no embedding"
        )
    if not 0 <= objective.cost_seed < 2**63:
        raise UserError(f"--cost_seed {objective.cost_seed}: give a whole number from 0 on")
    if objective.cost_seed and objective.cost_kind != "shuffled":
        raise UserError(f"--cost_seed {objective.cost_seed} belongs to --cost_kind shuffled")
    for line in warnings_of(needs):
        say(line)
    if objective.cost_cache_mib is not None:
        if not 0 <= objective.cost_cache_mib < math.inf:
            raise UserError(f"--cost_cache_mib {objective.cost_cache_mib}: give 0 (none) or more")
        if objective.cost_cache_mib and (
            objective.cost == "adaptive" or objective.cost_kind == "identity"
        ):
            raise UserError("--cost_cache_mib: an adaptive or an identity cost has no rows to keep")
    if objective.loss_backend == "triton" and not torch.cuda.is_available():
        raise UserError("--loss_backend triton needs an NVIDIA GPU: choose chunked")
    try:
        check_head_gradient(objective.head_gradient, objective.head_epsilon, objective.loss_backend)
    except ValueError as error:
        raise UserError(f"--{error}".replace("--backend", "--loss_backend")) from None
    if model.teacher is not None and objective.loss is not None:
        raise UserError(
            "--teacher and --loss exclude each other: a loss of your own has one target"
        )
    if model.teacher is not None and needs.needs_p:
        raise UserError(
            f"--teacher: mode {needs.name} with weighting {needs.emo_weighting} needs one target, "
            "not a distribution"
        )
    if model.teacher_top_k < 1:
        raise UserError(f"--teacher_top_k {model.teacher_top_k}: give 1 or more")


def unused_flags(run: Run) -> list[str]:
    """Returns a line for each of this package's flags that is given and changes nothing."""
    model, data, objective, lora = run.model, run.data, run.objective, run.lora
    mode, prices = objective.mode, objective.objective().needs_emo
    other = f"with --mode {mode}" if objective.loss is None else "with --loss"
    reasons = {  # flags -> whether they are read, and why not
        ("emo_weight",): (mode == "mix", other),
        ("tailr_gamma", "tailr_floor"): (mode == "tailr", other),
        ("mixce_eta",): (mode == "mixce", other),
        ("cost", "cost_kind", "cost_cache_mib"): (prices, other),
        ("head_epsilon",): (
            objective.head_gradient == "sampled",
            "without --head_gradient sampled",
        ),
        ("teacher_top_k",): (model.teacher is not None, "without --teacher"),
        ("shuffle_buffer",): (data.streaming, "without --streaming"),
        ("lora_r", "lora_alpha", "lora_dropout", "lora_embeddings"): (lora.lora, "without --lora"),
        ("sample_max_new_tokens",): (
            run.training.sample_prompts is not None,
            "without --sample_prompts",
        ),
    }
    usual = defaults(*FLAGS)
    return [
        f"--{name} {run.flags[name]} changes nothing {why}"
        for names, (is_read, why) in reasons.items()
        for name in names
        if not is_read and run.flags.get(name, usual[name]) != usual[name]
    ]


def warnings_of(objective: Objective) -> list[str]:
    """Returns what a user of this objective should know before the first step."""
    if objective.mode == "emo2" and objective.emo_weighting == "upstream":
        p = 0.9999
        weight = round(p / -math.log(p), -2)  # (emo + p) / nll, with an emo of 0
        return [
            f"--mode emo2 --emo_weighting upstream: where a token's probability is {p}, the weight "
            f"of its nll gradient is {weight:,.0f}, so learned tokens outweigh all others; "
            "the paper's weighting stays below 2"
        ]
    if objective.mode == "tailr" and 1000 * objective.tailr_gamma < 1:
        return [
            f"--mode tailr --tailr_gamma {objective.tailr_gamma:g}: a token's loss is within "
            f"1/1000 of mle's where its probability is above {1000 * objective.tailr_gamma:g}"
        ]
    return []


def check_lora(model: ModelArguments, lora: LoraArguments, training: TrainingArguments) -> None:
    """Raises UserError if the adapter's flags are invalid, or its base has random weights."""
    if not lora.lora:
        for name in ("lora_target_modules", "lora_target_parameters"):
            if getattr(lora, name):
                raise UserError(f"--{name} needs --lora")
        return
    if lora.qlora:
        if shards_weights(training):
            raise UserError(
                "--qlora: weights in 4 bits are not sharded here; "
                "choose --engine ddp, zero1 or zero2, or none"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "--qlora needs bitsandbytes: pip install bitsandbytes, or drop the flag"
            )
    if model.from_config:
        raise UserError(
            "--lora and --from_config exclude each other: an adapter of random weights is of no use"
        )
    for name in ("lora_r", "lora_alpha"):
        if getattr(lora, name) < 1:
            raise UserError(f"--{name} {getattr(lora, name)}: give 1 or more")
    if not 0 <= lora.lora_dropout < 1:
        raise UserError(f"--lora_dropout {lora.lora_dropout}: give a number from 0 on and below 1")


def check_cost_sharding(run: Run) -> None:
    """Raises UserError if --cost_sharding shard or vocab_parallel lacks something it needs.

    What depends on the model is checked by ``shard_cost`` once the model is loaded.
    """
    asked, objective, training = run.objective.cost_sharding, run.objective, run.training
    if asked in ("auto", "replicate"):
        return
    if training.world_size == 1:
        raise UserError(
            f"--cost_sharding {asked} needs at least 2 processes: launch with torchrun, "
            "or drop the flag"
        )
    if objective.cost_cache_mib:
        raise UserError(
            f"--cost_cache_mib: --cost_sharding {asked} keeps no rows; drop one of them"
        )
    if asked == "vocab_parallel" and not training.fsdp:
        raise UserError(
            "--cost_sharding vocab_parallel needs --engine fsdp: "
            "other engines do not shard by vocabulary; use shard"
        )
    if asked == "vocab_parallel" and run.model.teacher is not None:
        raise UserError(
            "--cost_sharding vocab_parallel and --teacher exclude each other; use shard"
        )
    if asked == "shard" and (objective.cost == "adaptive" or objective.cost_kind == "identity"):
        raise UserError(
            "--cost_sharding shard: an adaptive or an identity cost has no rows to shard"
        )


def check_hub(training: TrainingArguments) -> None:
    """Raises UserError unless the hub can be reached and knows the user."""
    try:
        with quiet_hub():
            HfApi().whoami(token=training.hub_token)
    except Exception as error:  # no token, a wrong token, or no network
        reason, advice = "the hub does not know you", "run: hf auth login"
        # TransportError belongs to the HTTP library that the hub's client uses.
        if any(cls.__name__ == "TransportError" for cls in type(error).__mro__):
            reason, advice = "the hub cannot be reached", "try again, or drop the flag"
        raise UserError(f"--push_to_hub: {reason} ({first_line(error)}); {advice}") from None


def check_data(data: DataArguments, training: TrainingArguments) -> None:
    """Raises UserError for data flags that are invalid, or exclude or need each other."""
    data.column_names()
    RECORD_LIMIT.set(data.max_record_mib)
    weights = data.data_weights
    if data.eval_path is not None and data.eval_fraction is not None:
        raise UserError("--eval_path and --eval_fraction exclude each other")
    if data.eval_fraction is not None and not 0 < data.eval_fraction < 1:
        raise UserError(f"--eval_fraction {data.eval_fraction}: give a share between 0 and 1")
    if weights is not None and (
        len(weights) != len(data.data_path) or min(weights) <= 0 or not math.isfinite(sum(weights))
    ):
        raise UserError(
            f"--data_weights {weights}: give a number above 0 for each of the "
            f"{len(data.data_path)} --data_path"
        )
    if data.shuffle_buffer < 1:
        raise UserError(f"--shuffle_buffer {data.shuffle_buffer}: give 1 (not shuffled) or more")
    check_blocks(data)
    if data.streaming:
        if training.max_steps <= 0:
            raise UserError(
                "--streaming needs --max_steps: a stream has no length to count epochs by"
            )
        if data.eval_fraction is not None:
            raise UserError(
                "--streaming and --eval_fraction exclude each other: hold data out with --eval_path"
            )
        if data.packing or training.balance_lengths:
            raise UserError(
                "--streaming and --packing or --balance_lengths exclude each other: "
                "a stream's lengths are unknown"
            )


def check_blocks(data: DataArguments) -> None:
    """Raises UserError for invalid flags about blocks of running text."""
    if data.block_size is None:
        if data.max_sentences is not None or data.documents != "auto" or data.detokenize:
            raise UserError(
                "--max_sentences, --documents and --detokenize are about running text: "
                "they need --block_size"
            )
        return
    if data.block_size < 2:
        raise UserError(f"--block_size {data.block_size}: give 2 or more")
    if data.max_sentences is not None and data.max_sentences < 0:
        raise UserError(f"--max_sentences {data.max_sentences}: give 1 or more, or 0 for all")
    for flag in ("streaming", "packing", "padding_free"):
        if getattr(data, flag):
            raise UserError(f"--block_size and --{flag} exclude each other: drop one")


def check_output(training: TrainingArguments) -> None:
    """Raises UserError if the output folder cannot be made, or is not empty and no run is resumed.

    Also checks that a checkpoint to resume from exists. Whether it is intact is checked later.
    """
    output, resume = Path(training.output_dir), asked_checkpoint(training)
    if resume is True and not (output.is_dir() and checkpoints(output)):
        raise UserError(f"--resume_from_checkpoint: no checkpoint in {output}")
    if resume not in (None, True) and not (Path(str(resume)) / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {resume}: not a checkpoint of a run")
    if resume is not None and training.resume is not None:
        raise UserError("--resume auto and --resume_from_checkpoint exclude each other: drop one")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; give a folder")
    if (
        resume is None
        and training.resume is None
        and output.exists()
        and any(file.name != LOCK_FILE for file in output.iterdir())
    ):
        raise UserError(
            f"--output_dir {output} is not empty; "
            "give another, or --resume auto to go on with its run"
        )
    check_writable("output_dir", output)


def check_batches(training: TrainingArguments) -> None:
    """Raises UserError for batch sizes, or a number of processes, that do not fit other flags."""
    names = (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "model_max_length",
    )
    for name in names:
        if getattr(training, name) < 1:
            raise UserError(f"--{name} {getattr(training, name)}: give 1 or more")
    if training.world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(
            f"launched as {os.environ['WORLD_SIZE']} processes, "
            f"but {training.world_size} found each other"
        )
    if training.engine == "ddp" and training.world_size == 1:
        raise UserError(
            "--engine ddp needs at least 2 processes: launch with torchrun, or choose none"
        )
    if training.fsdp and "RANK" not in os.environ:
        raise UserError(
            "--fsdp needs a launcher, also for one process: torchrun --nproc_per_node 1 ...; "
            "or drop the flag"
        )
    if training.engine == "none" and training.world_size > 1:
        raise UserError(
            f"--engine none is one process, and there are {training.world_size}: "
            "choose ddp, fsdp, zero1, zero2, zero3"
        )
    differences = getattr(deepspeed_of(training), "mismatches", [])
    if differences:  # the Trainer would say so only after files have been written
        raise UserError(
            "--deepspeed contradicts the flags: "
            f"{', '.join(line.strip(' -') for line in differences)}; write auto there"
        )
    if training.n_gpu > 1:
        raise UserError(
            f"one process sees {training.n_gpu} GPUs: launch with torchrun, "
            "or set CUDA_VISIBLE_DEVICES to one"
        )
    if training.global_batch is not None:
        size, ranks = training.train_batch_size, training.world_size
        if training.global_batch < 1 or training.global_batch % (size * ranks):
            rows, left = divmod(training.global_batch, ranks)
            fits = f"; --per_device_train_batch_size {math.gcd(rows, size)} fits"
            advice = "" if left or rows < 1 else fits
            raise UserError(
                f"--global_batch {training.global_batch} is no multiple of {size * ranks}, the "
                f"examples of {ranks} process(es) with {size} each{advice}"
            )
        accumulation = accumulation_of(training)
        if training.gradient_accumulation_steps not in (1, accumulation):
            raise UserError(
                f"--global_batch {training.global_batch} asks for "
                f"--gradient_accumulation_steps {accumulation}"
            )
