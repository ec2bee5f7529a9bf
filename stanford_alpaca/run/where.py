"""Chooses what nobody has said: processes, engine, precision, resuming, and the published recipe.

The launchers ask with ``python -m stanford_alpaca.run.where [--recipe published] -- FLAGS`` and
evaluate the lines of bash that it prints. ``emo train`` asks in launcher.py.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error
from stanford_alpaca.run.config_file import with_config
from stanford_alpaca.run.legacy_flags import split_flags

STEP = 128  # examples of a step in the published recipe
PUBLISHED = {
    "num_train_epochs": "3",
    "per_device_train_batch_size": "4",
    "learning_rate": "2e-5",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "0.03",
    "weight_decay": "0",
    "model_max_length": "512",
    "logging_steps": "1",
    "save_strategy": "steps",
    "save_steps": "2000",
    "save_total_limit": "1",
}
ASKED = {  # variable of a launcher -> the flag that it holds
    "MODEL_PATH": "model_name_or_path",
    "MODE": "mode",
    "DATA": "data_path",
    "OUTPUT_DIR": "output_dir",
    "MAX_RECORD_MIB": "max_record_mib",
}
KEEP_MEMORY = {  # glibc then keeps the memory of freed tensors, see benchmarks/LOG.md
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


@dataclass(frozen=True)
class Devices:
    """What this machine has."""

    gpus: int  # that are visible
    bf16: bool  # whether they compute in bfloat16
    cores: int

    @classmethod
    def found(cls) -> "Devices":
        """Returns what torch sees."""
        import torch

        gpus = torch.cuda.device_count()
        bf16 = gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(gpus, bf16, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Where:
    """Where a run computes.

    Attributes:
        launched: whether ranks are started by ``stanford_alpaca.launch``, one of them too.
        flags: the whole command line of training.
        environment: variables for it.
        notes: lines for the user.
    """

    processes: int
    launched: bool
    flags: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def value(self, name: str) -> str:
        """Returns the last value of a flag, from the command line or from --config, or nothing."""
        found = {flag.name: flag.values for flag in split_flags(with_config(self.flags)[0])}
        value = (found.get(name) or [""])[0]
        return os.path.expanduser(value) if name == "output_dir" else value  # as transformers does


def where_to_run(
    argv: list[str], environment: Mapping[str, str], devices: Devices, published: bool = False
) -> Where:
    """Completes a command line of training; what it or its --config says stays.

    Args:
        environment: may have NPROC and ENGINE, as the launchers document them.
        published: whether the recipe of the paper takes the place of the Trainer's defaults.

    Raises:
        UserError: NPROC is no number, ENGINE and a flag choose both, --config cannot be read.
    """
    given = {flag.name: flag.values for flag in split_flags(with_config(argv)[0])}
    processes, variables = _processes(environment, devices)
    engine = environment.get("ENGINE") or ""
    chosen: list[str] = []
    if given.keys() & {"engine", "fsdp", "deepspeed"}:
        if engine:
            raise UserError(
                f"ENGINE={engine} and --engine, --fsdp or --deepspeed exclude each other: drop one"
            )
    else:
        several = "fsdp" if devices.gpus else "ddp"
        engine = engine or ("none" if processes == 1 else several)
        chosen += ["--engine", engine]
    if devices.bf16 and not given.keys() & {"bf16", "fp16"}:
        chosen += ["--bf16", "True"]
    if not devices.gpus:
        cores = max(1, devices.cores // processes)
        usual = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(cores), **KEEP_MEMORY}
        variables |= {name: value for name, value in usual.items() if not environment.get(name)}
    if not given.keys() & {"resume", "resume_from_checkpoint"}:
        chosen += ["--resume", "auto"]
    recipe, notes = _published(given, processes) if published else ({}, [])
    tokens = [word for name, value in recipe.items() for word in (f"--{name}", value)]
    asked = engine or (given.get("engine") or ["ddp"])[0]  # --fsdp and --deepspeed are launched
    launched = processes > 1 or asked != "none"
    return Where(processes, launched, [*tokens, *chosen, *argv], variables, notes)


def _processes(environment: Mapping[str, str], devices: Devices) -> tuple[int, dict[str, str]]:
    """Returns the number of processes, and the variable that hides further GPUs from one."""
    asked = environment.get("NPROC") or str(devices.gpus or 1)
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"NPROC={asked}: give a number of processes")
    if int(asked) > 1 or devices.gpus <= 1:
        return int(asked), {}
    first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return 1, {"CUDA_VISIBLE_DEVICES": first}


def _published(given: Mapping[str, list[str]], processes: int) -> tuple[dict[str, str], list[str]]:
    """Returns the recipe's flags that are not given, and what to say about the batch."""
    recipe = {name: value for name, value in PUBLISHED.items() if name not in given}
    if given.keys() & {"global_batch", "gradient_accumulation_steps"}:
        return recipe, []
    usual = [PUBLISHED["per_device_train_batch_size"]]
    asked = (given.get("per_device_train_batch_size") or usual)[0]
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"--per_device_train_batch_size {asked}: give 1 or more")
    at_once = int(asked) * processes
    batch = max(at_once, STEP // at_once * at_once)
    note = f"global batch {batch}: {STEP} cannot be had from {processes} processes of {asked}"
    return recipe | {"global_batch": str(batch)}, [] if batch == STEP else [note]


def in_bash(where: Where) -> str:
    """Returns lines of bash that set what a launcher needs to know."""
    lines = [f"export {name}={shlex.quote(text)}" for name, text in where.environment.items()]
    # a full disk under the output ends no training
    lines += [f"echo {shlex.quote(note)} || true" for note in where.notes]
    lines += [f"NPROC={where.processes}", f"LAUNCHED={1 if where.launched else ''}"]
    for variable, flag in ASKED.items():
        lines.append(f"{variable}={shlex.quote(where.value(flag))}")
    lines.append(f"FLAGS=({shlex.join(where.flags)})")
    return "\n".join(lines)


def main() -> None:
    """Prints where a launcher's training runs, in bash."""
    options, argv = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    published = options == ["--recipe", "published"]
    exit_on_user_error(
        lambda: print(in_bash(where_to_run(argv, os.environ, Devices.found(), published)))
    )


if __name__ == "__main__":
    main()
