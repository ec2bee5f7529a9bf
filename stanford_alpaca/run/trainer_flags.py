"""Every flag of transformers' TrainingArguments is either honoured or refused by name.

A test finds the flags that a new version of transformers adds.
"""

import copy
from typing import Any

import transformers
from accelerate.utils import DynamoBackend
from transformers import Trainer
from transformers.training_args import OptimizerNames

from stanford_alpaca.errors import UserError

HONOURED = {
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules",
    "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "use_cache", "neftune_noise_alpha", "torch_empty_cache_steps", "logging_strategy",
    "logging_steps", "logging_first_step", "log_on_each_node", "include_num_input_tokens_seen",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy",
    "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start",
    "eval_accumulation_steps", "save_only_model", "save_strategy", "save_steps", "save_total_limit",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_revision",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "full_determinism",
    "seed", "data_seed", "use_cpu", "accelerator_config", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "train_sampling_strategy",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
    "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug",
    "skip_memory_metrics", "do_train", "do_eval", "resume_from_checkpoint", "local_rank",
}  # fmt: skip
LOSS = "would train something else than --mode says"
EVALUATION = "would change nothing: evaluation sums the loss of supervised tokens"
REFUSED = {
    "label_smoothing_factor": LOSS,
    "use_liger_kernel": LOSS,
    "liger_kernel_config": LOSS,
    "average_tokens_across_devices": LOSS,
    "prediction_loss_only": EVALUATION,
    "eval_do_concat_batches": EVALUATION,
    "eval_use_gather_object": EVALUATION,
    "include_for_metrics": EVALUATION,
    "batch_eval_metrics": EVALUATION,
    "label_names": EVALUATION,
    "bf16_full_eval": (
        "would round the weights that are trained: evaluation computes as training does"
    ),
    "fp16_full_eval": (
        "would round the weights that are trained: evaluation computes as training does"
    ),
    "do_predict": (
        "would change nothing: evaluate with python -m stanford_alpaca.evaluation.metrics"
    ),
    "dataloader_drop_last": (
        "would change nothing: the last step of an epoch is filled up, and no example is dropped"
    ),
    "remove_unused_columns": "would take away what the collator reads",
    "length_column_name": "would change nothing: lengths are those of the token ids",
    "auto_find_batch_size": "would train with another batch than the run's record says",
    "ignore_data_skip": "would repeat examples: a run goes on with the one after which it stopped",
    "restore_callback_states_from_checkpoint": (
        "would change nothing: a run that goes on has all its states"
    ),
    "enable_jit_checkpoint": "would change nothing: a stopped run saves by itself",
    "save_on_each_node": "would write what all machines share several times",
    "logging_nan_inf_filter": "would hide what --skip_nonfinite looks for",
    "hub_strategy": "would push what is not finished: only the finished model is pushed",
    "hub_always_push": "would push what is not finished: only the finished model is pushed",
    "parallelism_config": "would change nothing: --engine and --cost_sharding say what is sharded",
}
# keys of --accelerator_config that change what a batch is -> the values that are allowed
ACCELERATOR = {
    "split_batches": (False, None),
    "dispatch_batches": (False, None),
    "even_batches": (True, None),
    "gradient_accumulation_kwargs": (None,),
}
# flags that not every optimizer uses -> their defaults
OF_OPTIMIZERS = {
    "optim_args": None,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "optim_target_modules": None,
}


def check_flags(training: transformers.TrainingArguments, defaults: dict[str, Any]) -> None:
    """Raises UserError for a flag that would change nothing, or not what its name says.

    Args:
        defaults: the default value of each flag.
    """
    for name, why in REFUSED.items():
        value = getattr(training, name)
        value = getattr(value, "value", value)
        if value != defaults[name] and value not in (None, [], {}):
            raise UserError(f"--{name} {value}: {why}; drop it")
    for name, harmless in ACCELERATOR.items():
        value = getattr(training.accelerator_config, name)
        if value not in harmless:
            raise UserError(
                f"--accelerator_config {name} {value}: would change what a batch is; leave it out"
            )
    if training.dataloader_persistent_workers and not training.dataloader_num_workers:
        raise UserError(
            "--dataloader_persistent_workers needs --dataloader_num_workers of 1 or more"
        )
    backend = (training.torch_compile_backend or "no").upper()
    if backend not in (known := DynamoBackend.list()):
        raise UserError(
            f"--torch_compile_backend {backend.lower()}: choose from {', '.join(known).lower()}"
        )
    if training.fp16 and training.use_cpu:
        raise UserError("--fp16 needs a GPU; on a CPU choose --bf16, or neither")


def check_optimizer_flags(training: transformers.TrainingArguments) -> None:
    """Raises UserError for a flag that the chosen optimizer does not use."""
    made = Trainer.get_optimizer_cls_and_kwargs(training)
    for name, default in OF_OPTIMIZERS.items():
        without = copy.copy(training)
        setattr(without, name, default)
        if (
            getattr(training, name) not in (default, None)
            and Trainer.get_optimizer_cls_and_kwargs(without) == made
        ):
            raise UserError(
                f"--{name} would change nothing for --optim "
                f"{OptimizerNames(training.optim).value}: drop it"
            )
