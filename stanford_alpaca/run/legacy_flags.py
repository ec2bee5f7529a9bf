"""Translates the transformers 4 flags of Alpaca's published commands to transformers 5."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.errors import UserError, first_line


class Flag(NamedTuple):
    """One flag of a command line.

    ``--per-gpu-train-batch-size=4`` has the name per_gpu_train_batch_size and the values ["4"].
    """

    name: str  # with underscores; "" for words before the first flag
    values: list[str]
    tokens: list[str]  # as given

    @property
    def is_on(self) -> bool:
        """Whether a switch is on, as with ``--flag``, ``--flag True`` or ``--flag=1``."""
        return not self.values or self.values[0].lower() in ("true", "t", "yes", "y", "1")


def renamed(new: str) -> Callable[[Flag], tuple[list[str], str]]:
    return lambda flag: ([f"--{new}", *flag.values], "")


def choice_of(*tokens: str) -> Callable[[Flag], tuple[list[str], str]]:
    """Translates a switch that became a value of another flag."""
    return lambda flag: (list(tokens), "") if flag.is_on else ([], "it was off")


def dropped(why: str) -> Callable[[Flag], tuple[list[str], str]]:
    return lambda flag: ([], why)


def _warmup(flag: Flag) -> tuple[list[str], str]:
    try:
        usable = not flag.values or float(flag.values[0]) < 1
    except ValueError:
        usable = True  # the parser reports what is wrong with it
    if not usable:  # from 1 on, warmup_steps would be a number of steps
        raise UserError(
            f"--warmup_ratio {flag.values[0]}: give a share of the steps below 1, or --warmup_steps"
        )
    return ["--warmup_steps", *flag.values], ""


# old name -> its translation: the new tokens, and if there are none, the reason
OLD: dict[str, Callable[[Flag], tuple[list[str], str]]] = {
    "evaluation_strategy": renamed("eval_strategy"),
    "warmup_ratio": _warmup,
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "gradient_checkpointing": renamed("activation_checkpointing"),
    "gradient_checkpointing_kwargs": renamed("activation_checkpointing_kwargs"),
    "no_cuda": renamed("use_cpu"),
    "push_to_hub_model_id": renamed("hub_model_id"),
    "adafactor": choice_of("--optim", "adafactor"),
    "group_by_length": choice_of("--train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": choice_of("--include_for_metrics", "inputs"),
    "overwrite_output_dir": dropped("nothing is ever overwritten here; give a new --output_dir"),
    "logging_dir": dropped(
        "TensorBoard's folder is the environment variable TENSORBOARD_LOGGING_DIR"
    ),
    "save_safetensors": dropped("weights are always safetensors"),
    "include_tokens_per_second": dropped("supervised_tokens_per_s is always logged"),
    "use_mps_device": dropped("the device is found by itself"),
    "half_precision_backend": dropped("PyTorch's own mixed precision is the only one"),
    "fp16_backend": dropped("PyTorch's own mixed precision is the only one"),
    "fsdp_min_num_params": dropped("the model's own layers are wrapped, whatever their size"),
    "fp16_opt_level": dropped("PyTorch's own mixed precision is the only one"),
}
FSDP_WORDS: dict[str, dict[str, object]] = {
    "full_shard": {"reshard_after_forward": True},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},  # FSDP2 always wraps
    "true": {},
}
FSDP = ("fsdp", "fsdp_config", "fsdp_transformer_layer_cls_to_wrap")


def translate(argv: list[str], has_tf32: bool = True) -> tuple[list[str], list[str]]:
    """Returns the command line for transformers 5, and a line for every flag changed or dropped.

    Everything else keeps its value and place. ``has_tf32`` says whether this machine can compute
    in TF32. If it cannot, ``--tf32 True`` is dropped.

    Raises:
        UserError: an old value has no counterpart.
    """
    new: list[str] = []
    lines: list[str] = []
    flags = split_flags(argv)
    old_fsdp = any(flag.name == FSDP[-1] or (flag.name == "fsdp" and flag.values) for flag in flags)
    fsdp = {flag.name: flag for flag in flags if old_fsdp and flag.name in FSDP}
    for flag in flags:
        if flag.name in fsdp:
            continue
        if flag.name in OLD:
            tokens, why = OLD[flag.name](flag)
        elif flag.name == "tf32" and flag.is_on and not has_tf32:
            tokens, why = [], "TF32 needs a CUDA GPU, Ampere or newer"
        else:
            new += flag.tokens
            continue
        new += tokens
        lines.append(_line(flag.tokens, tokens, why))
    if fsdp:
        before, after = [token for flag in fsdp.values() for token in flag.tokens], fsdp_flags(fsdp)
        new += after
        lines.append(_line(before, after, "FSDP is off"))
    return new, lines


def split_flags(argv: list[str]) -> list[Flag]:
    """Splits a command line into flags, each with the values that follow it."""
    flags: list[Flag] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            flags.append(Flag(name.replace("-", "_"), [value] if equals else [], [token]))
        elif flags:
            flags[-1].values.append(token)
            flags[-1].tokens.append(token)
        else:
            flags.append(Flag("", [token], [token]))
    return flags


def fsdp_flags(old: dict[str, Flag]) -> list[str]:
    """Returns ``--fsdp --fsdp_config JSON`` for the flags of transformers 4, or [] if FSDP is off.

    A key of a given fsdp_config wins over the flag of the same meaning, as in transformers 4.
    """
    if "fsdp" not in old:
        return []
    words = [word.lower() for word in " ".join(old["fsdp"].values or ["true"]).split()]
    if not words or {"false", "no_shard"} & set(words):
        return []
    config: dict[str, object] = {}
    for word in words:
        if word not in FSDP_WORDS:
            raise UserError(
                f"--fsdp {word}: choose from full_shard, shard_grad_op, offload and auto_wrap"
            )
        config |= FSDP_WORDS[word]
    if "fsdp_transformer_layer_cls_to_wrap" in old:
        names = ",".join(old["fsdp_transformer_layer_cls_to_wrap"].values)
        config["transformer_layer_cls_to_wrap"] = [name.strip() for name in names.split(",")]
    if "fsdp_config" in old:
        config |= read_fsdp_config(" ".join(old["fsdp_config"].values))
    return ["--fsdp", "--fsdp_config", json.dumps(config)] if config else ["--fsdp"]


def read_fsdp_config(text: str) -> dict[str, object]:
    """Reads the value of ``--fsdp_config``: a JSON object, or a file with one.

    Keys lose a leading ``fsdp_``, as they do in transformers.

    Raises:
        UserError: it is neither.
    """
    try:
        config = json.loads(text) if text.startswith("{") else read_json(Path(text))
        return {key.removeprefix("fsdp_"): value for key, value in config.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--fsdp_config {text}: no JSON object and no file with one ({first_line(error)})"
        ) from None


def _line(before: list[str], after: list[str], why: str) -> str:
    return (
        f"{shlex.join(before)} is read as {shlex.join(after)}"
        if after
        else f"{shlex.join(before)} is dropped: {why}"
    )
