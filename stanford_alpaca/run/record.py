"""The record of a run: its flags, and what it was made with.

``run.yaml`` and the manifests hold it. A run can be repeated from its ``run.yaml``.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import CHAT_TEMPLATE_FILE

from stanford_alpaca import __version__
from stanford_alpaca.checkpoint.manifest import MANIFEST_FILE, file_sha256, write_whole
from stanford_alpaca.checkpoint.run_file import MADE_WITH, RUN_FILE, RUN_FILE_FROM, read_run
from stanford_alpaca.console import storable
from stanford_alpaca.data.sources import identify
from stanford_alpaca.losses.own import COPY
from stanford_alpaca.models.identity import BASE, identify_model
from stanford_alpaca.run import environment
from stanford_alpaca.run.arguments import FLAGS, Run, defaults

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed", "peft")
BY_CONTENT = ("model", "teacher", "cost")
# flags whose value is a file, a folder that holds the file, or the content itself
CONFIGS = ("deepspeed", "fsdp_config", "accelerator_config", "chat_template")
CONTENT = "content of --"
LOSS = f"{CONTENT}loss"
ENVIRONMENT = "environment variable "
# flags that do not change the result, or whose content is compared instead (see made_with)
IRRELEVANT_FLAGS = {
    "model_name_or_path", "teacher", "cost", "data_path", "eval_path", "output_dir", "resume",
    "resume_from_checkpoint", "cache_dir", "max_record_mib", "logging_strategy", "logging_steps",
    "logging_first_step", "logging_nan_inf_filter", "log_on_each_node", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen",
    "skip_memory_metrics", "save_strategy", "save_steps", "save_total_limit", "save_only_model",
    "sample_prompts", "sample_steps", "sample_max_new_tokens", "push_to_hub", "hub_model_id",
    "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "do_train", "do_eval",
    "do_predict", "local_rank", "ddp_timeout", "skip_nonfinite", "preprocessing_num_workers",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
}  # fmt: skip
# flags that change only rounding, what is evaluated, or where tensors are kept
NUMERICS_FLAGS = {
    "engine", "fsdp", "fsdp_config", "deepspeed", "per_device_train_batch_size",
    "gradient_accumulation_steps", "global_batch", "balance_lengths", "padding_free",
    "cost_sharding", "cost_cache_mib", "loss_backend", "attn_implementation", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "torch_empty_cache_steps", "use_cpu", "use_cache", "ddp_backend", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "eval_strategy", "eval_steps",
    "eval_delay", "eval_on_start", "eval_accumulation_steps", "per_device_eval_batch_size",
}  # fmt: skip
# the irrelevant flags that decide which examples are drawn from a stream
STREAM_FLAGS = {"dataloader_num_workers"}
# flags that decide which checkpoint counts as best, and so which weights the run keeps
BEST_CHECKPOINT_FLAGS = {
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_path", "save_strategy",
    "save_steps",
}  # fmt: skip
# flags that may not change when a run resumes: they decide which parameters the optimizer state
# belongs to, and which example comes next
STATE_FLAGS = {
    "optim", "optim_args", "optim_target_modules", "lora", "qlora", "lora_r", "lora_target_modules",
    "lora_target_parameters", "lora_embeddings", "seed", "data_seed", "eval_fraction",
    "data_weights", "streaming", "shuffle_buffer", "columns", "model_max_length", "block_size",
    "documents", "max_sentences", "detokenize", "packing", "prompt_template", "special_tokens",
    "train_history", "train_sampling_strategy",
}  # fmt: skip
# the best value so far was measured by these
MEASURE_FLAGS = {"metric_for_best_model", "greater_is_better"}
# fixed with reduce_lr_on_plateau, a schedule that has lowered the learning rate on its own
PLATEAU_FLAGS = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"}
HEADER = "# Repeat: python -m stanford_alpaca.train --config run.yaml --output_dir ANOTHER{}\n"


def record_of(run: Run) -> dict[str, Any]:
    """Returns all that decides a run's result, as ``run.yaml`` and the manifests hold it.

    Reads every file of the data and of the base model.
    """
    return storable(run.flags | {MADE_WITH: made_with(run)})


def made_with(run: Run) -> dict[str, Any]:
    """Returns what the result depends on besides the flags.

    These are versions, environment variables, processes, models and data.
    """
    installed = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    versions = {name: importlib.metadata.version(name) for name in installed}
    paths, training = [*run.data.data_path, *(run.data.eval_path or [])], run.training
    models = {"model": run.model.model_name_or_path}
    if run.model.teacher:
        models["teacher"] = run.model.teacher
    if run.objective.cost_is_model:
        models["cost"] = run.objective.cost
    cost = Path(run.objective.cost)
    return {
        "stanford_alpaca": __version__,
        "python": platform.python_version(),
        **versions,
        **{f"{ENVIRONMENT}{name}": value for name, value in environment.recorded().items()},
        "processes": training.world_size,
        "rows_per_step": training.train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size,
        **{role: identify_model(name, training.cache_dir) for role, name in models.items()},
        BASE: identify_model(run.model.model_name_or_path, training.cache_dir, weights=True),
        **({"cost": f"sha256:{file_sha256(cost)}"} if cost.is_file() else {}),
        **{
            f"{CONTENT}{name}": digest_of_config(run.flags[name])
            for name in CONFIGS
            if run.flags.get(name)
        },
        **({LOSS: run.objective.own.digest} if run.objective.own else {}),
        "data": {path: identify(path, run.data.streaming) for path in paths},
    }


def digest_of_config(value: str) -> str:
    """Returns the sha256 of a file, of a folder's chat template, or else of the value itself."""
    inside = (Path(value) / name for name in (CHAT_TEMPLATE_FILE, "tokenizer_config.json"))
    # Not Path.is_file: it raises if the value is too long for a file name.
    value = next((str(file) for file in inside if os.path.isfile(file)), value)
    return f"""sha256:{
        file_sha256(Path(value))
        if os.path.isfile(value)
        else sha256(str(value).encode()).hexdigest()
    }"""


def changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Returns what differs between two records, one line for each difference.

    A flag that a record lacks has its default there, because a later version may have added it.

    Returns:
        Flags that decide the result; data, models and flags that may not change when a run
        resumes; and differences that only change rounding.
    """
    before, now = records = [_compared(record) for record in (before, now)]
    flags: list[str] = []
    contents: list[str] = []
    rounding: list[str] = []
    strict, usual = _strict(*records), defaults(*FLAGS)
    free, rounds, fixed = IRRELEVANT_FLAGS - strict, NUMERICS_FLAGS - strict, _fixed(*records)
    for name in [
        name
        for name in {**before, **now}
        if name not in free | {MADE_WITH, "data_path", "eval_path"}
    ]:
        was, is_now = (record.get(name, usual.get(name)) for record in records)
        if was != is_now:
            found = rounding if name in rounds else contents if name in fixed else flags
            found.append(f"--{name} was {_said(was)}, is {_said(is_now)}")
    with_before, with_now = (record.get(MADE_WITH) or {} for record in records)
    # The data is compared below. BASE is part of the model.
    for name in [name for name in {**with_before, **with_now} if name not in ("data", BASE)]:
        was, is_now = with_before.get(name), with_now.get(name)
        if was == is_now:
            continue
        if name == LOSS:
            if None not in (was, is_now):  # else --loss itself differs
                flags.append("the file of --loss has changed")
        elif name in BY_CONTENT or name.startswith(CONTENT):
            other_engine = name.startswith(CONTENT) and None in (was, is_now)
            (rounding if other_engine else contents).append(f"the {name} has changed")
        else:
            precision = name.removeprefix(ENVIRONMENT) in environment.PRECISION
            found = flags if precision else rounding
            # A run's place in the data is a number of steps. With other steps it is not known.
            if name == "rows_per_step":
                found = flags if was is None else contents
            found.append(f"{name} was {_said(was)}, is {_said(is_now)}")
    for flag, found in (
        ("data_path", contents),
        ("eval_path", contents if "eval_path" in strict else rounding),
    ):
        old, new = (
            [(made.get("data") or {}).get(path) for path in record.get(flag) or []]
            for record, made in ((before, with_before), (now, with_now))
        )
        if old != new:
            was, is_now = (", ".join(record.get(flag) or ["not given"]) for record in records)
            found.append(
                f"--{flag} was {was}, is {is_now}"
                if was != is_now
                else f"--{flag}: {is_now} has changed"
            )
    return flags, contents, rounding


def _compared(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record in JSON's types. Of --loss the name stays; its file has a hash."""
    copied = json.loads(json.dumps(record))
    if copied.get("loss"):
        copied["loss"] = str(copied["loss"]).rpartition(":")[2]
    return copied


def _fixed(*records: dict[str, Any]) -> set[str]:
    """Returns the flags that may not change when a run resumes."""
    on_plateau = any(
        record.get("lr_scheduler_type") == "reduce_lr_on_plateau" for record in records
    )
    return (
        STATE_FLAGS
        | (PLATEAU_FLAGS if on_plateau else set())
        | (MEASURE_FLAGS if _seeks_best(*records) else set())
    )


def _seeks_best(*records: dict[str, Any]) -> bool:
    return any(
        record.get("load_best_model_at_end") or record.get("save_strategy") == "best"
        for record in records
    )


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)


def _strict(*records: dict[str, Any]) -> set[str]:
    """Returns the flags of IRRELEVANT_FLAGS and NUMERICS_FLAGS that decide the result here.

    They do so because of other flags: --streaming, or flags that look for the best checkpoint. A
    --cost that is a word has no content to compare.
    """
    streams = any(record.get("streaming") for record in records)
    in_words = any(record.get("cost", "frozen") in ("frozen", "adaptive") for record in records)
    return (
        (STREAM_FLAGS if streams else set())
        | (BEST_CHECKPOINT_FLAGS if _seeks_best(*records) else set())
        | ({"cost"} if in_words else set())
    )


def differences(run: Run, now: dict[str, Any]) -> list[str]:
    """Returns a line for each thing that has changed since --config's run.yaml was written."""
    before = run.made_with
    names = [
        *before,
        *(name for name in now if before and name.startswith(ENVIRONMENT) and name not in before),
    ]
    lines = [
        f"made with {name} {_said(before.get(name))}, now {_said(now.get(name))}"
        for name in names
        if name != "data" and before.get(name) != now.get(name)
    ]
    data = before.get("data") or {}
    return lines + [
        f"{path} has changed since"
        for path, digest in now["data"].items()
        if data.get(path, digest) != digest
    ]


def write_run(run: Run, record: dict[str, Any]) -> None:
    """Writes run.yaml, and the file of --loss, into the output folder.

    A run that resumes there with other flags writes run-from-CHECKPOINT.yaml instead. Training is
    about to go on, so a finished model in the folder loses its manifest: it is not what this run
    will end with.
    """
    output, resume = Path(run.training.output_dir), run.training.resume_from_checkpoint
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    file, before = output / RUN_FILE, read_run(output)
    if before is not None and resume is not None:
        if not any(changes(before, record)):
            return
        file = output / RUN_FILE_FROM.format(Path(resume).name)
    own, more = run.objective.own, ""
    if own is not None:
        copy = COPY if file.name == RUN_FILE else f"{file.stem}-{COPY}"
        more = f" --loss {copy}:{own.name}"
        write_whole(output / copy, own.source)
    if run.model.trust_remote_code:  # a file of flags may not ask for it
        more += " --trust_remote_code"
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    write_whole(file, HEADER.format(more) + text)
