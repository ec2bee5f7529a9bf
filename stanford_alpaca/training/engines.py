"""Engines by name: the flags that each of them sets, and a check of which one is active."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.distributed.engine import deepspeed_of
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.training.cost_sharding import check_separate

PACKAGE = Path(__file__).resolve().parents[1]


def ds_configs() -> Path:
    """Returns the folder of the DeepSpeed configurations.

    In an installed wheel it is inside the package. In a checkout it is beside the package.
    """
    inside = PACKAGE / "ds_configs"
    return inside if inside.is_dir() else PACKAGE.parent / "ds_configs"


def engine_flags(engine: str | None, fsdp: Any, deepspeed: Any) -> tuple[Any, Any]:
    """Returns ``--fsdp`` and ``--deepspeed`` as the engine's name sets them.

    Raises:
        UserError: a flag contradicts the name, or the engine's DeepSpeed configuration is missing.
    """
    if engine is None:
        if fsdp and deepspeed:
            raise UserError("--fsdp and --deepspeed exclude each other; drop one")
        check_deepspeed(deepspeed)
        return fsdp, deepspeed
    zero = str(ds_configs() / f"{engine}.json") if engine.startswith("zero") else None
    if deepspeed not in (None, zero) or (fsdp and engine != "fsdp"):
        raise UserError(
            f"--engine {engine} and --{'fsdp' if fsdp else 'deepspeed'} exclude each other: "
            "drop one"
        )
    if zero is not None and not Path(zero).is_file():
        raise UserError(
            f"--engine {engine}: no {zero}; "
            "copy the repository's ds_configs there, or give --deepspeed FILE"
        )
    return (fsdp or True) if engine == "fsdp" else None, zero


def check_deepspeed(given: Any) -> None:
    """Raises UserError unless --deepspeed is a JSON object or a file with one."""
    if not isinstance(given, str):
        return
    text = given.strip()
    try:
        file = Path(given).expanduser()
        value = json.loads(text) if text.startswith("{") else read_json(file)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(
            f"--deepspeed {given}: broken JSON at {where}, {error.msg}; mend it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--deepspeed {given}: no JSON ({first_line(error)}); give a JSON file in UTF-8"
        ) from None
    except OSError as error:
        reason = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({error.strerror})"
        )
        raise UserError(
            f"--deepspeed {given}: {reason}; give a JSON file, or --engine zero1, zero2 or zero3"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"--deepspeed {given}: a {type(value).__name__}, "
            "wanted an object of DeepSpeed's settings; mend it"
        )


def skip_slow_deepspeed_probes() -> None:
    """Keeps DeepSpeed on a CPU from two slow steps. Must be called before its engine is made.

    The first is to compile its all-reduce in shared memory, which only tensor-parallel inference
    calls. With g++ this takes most of a minute in every new environment. The second is to start a
    numactl process for each gradient, to count its devices. DeepSpeed does this under torchrun.
    """
    import deepspeed  # imported here, because most runs do without it

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # DeepSpeed's own launcher sets this variable.
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_engine(trainer: Any) -> None:
    """Raises UserError if the requested engine is not the one that is about to train.

    Also makes DDP on three ranks or more sum each gradient by itself.
    """
    args, active = trainer.args, active_engine(trainer.model_wrapped)
    wanted = args.engine
    if wanted is None and args.fsdp:
        wanted = "fsdp"
    # With the user's own DeepSpeed file, offloading is not compared.
    elif wanted is None and args.deepspeed:
        stage = deepspeed_of(args).get_value("zero_optimization.stage", 0)
        wanted, active = f"zero{stage}", active.removesuffix("_offload")
    if wanted not in (None, active):
        raise UserError(f"the engine {wanted} was asked for, but the active one is {active}")
    if active == "ddp" and args.world_size > 2:
        allreduce_each_gradient(trainer.model_wrapped)
    if active == "fsdp":
        check_separate(trainer.accelerator.unwrap_model(trainer.model))


def allreduce_each_gradient(model: nn.Module) -> None:
    """Makes DDP sum each gradient by itself: one all-reduce per parameter, not one per bucket.

    Three ranks or more add in an order that depends on a gradient's place in its bucket. DDP
    rearranges its buckets after the first step of every start. So a resumed run would differ in
    the last bits from one that was not interrupted.
    """
    ddp: Any = getattr(model, "_orig_mod", model)
    share = 1 / torch.distributed.get_world_size()

    def add(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer().mul_(share)
        sums = [
            torch.distributed.all_reduce(each, async_op=True).get_future()
            for each in bucket.gradients()
        ]
        return torch.futures.collect_all(sums).then(lambda _: buffer)

    ddp.register_comm_hook(None, add)


def active_engine(model: nn.Module) -> str:
    """Returns the name of the engine that wraps a model which is ready to be trained."""
    inner: Any = getattr(model, "_orig_mod", model)  # unwraps a compiled model
    if isinstance(model, FSDPModule) or isinstance(inner, FSDPModule):
        return (
            "fsdp"
            if all(isinstance(parameter, DTensor) for parameter in model.parameters())
            else "fsdp in part"
        )
    if isinstance(inner, DistributedDataParallel):
        return "ddp"
    if hasattr(inner, "zero_optimization_stage"):  # DeepSpeed's engine, without importing DeepSpeed
        offloads = [
            getattr(inner.optimizer, name, False) for name in ("offload_optimizer", "offload_param")
        ]
        return f"zero{inner.zero_optimization_stage()}" + ("_offload" if all(offloads) else "")
    return "none"
