"""Where a run computes: engines by name, FSDP2 also on CPU, devices, memory."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp_utils
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from stanford_alpaca.cost_sharding import check_separate, wrap_separately
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.objective.head import body_of

ENGINES = ("none", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")
DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"  # the wheel installs it beside the package, too


def engine_flags(engine: str | None, fsdp: Any, deepspeed: Any) -> tuple[Any, Any]:
    """``--fsdp`` and ``--deepspeed`` as the engine's name sets them.

    Raises:
        UserError: a flag that contradicts the name, or a DeepSpeed configuration that is not where the package is.
    """
    if engine is None:
        if fsdp and deepspeed:
            raise UserError("--fsdp and --deepspeed exclude each other; drop one")
        check_deepspeed(deepspeed)
        return fsdp, deepspeed
    zero = str(DS_CONFIGS / f"{engine}.json") if engine.startswith("zero") else None
    if deepspeed not in (None, zero) or (fsdp and engine != "fsdp"):
        raise UserError(f"--engine {engine} and --{'fsdp' if fsdp else 'deepspeed'} exclude each other: drop one")
    if zero is not None and not Path(zero).is_file():
        raise UserError(f"--engine {engine}: no {zero}; copy the repository's ds_configs there, or give --deepspeed FILE")
    return (fsdp or True) if engine == "fsdp" else None, zero


def check_deepspeed(given: Any) -> None:
    """Raises UserError for a --deepspeed that is no JSON object, nor a file with one."""
    if not isinstance(given, str):
        return
    text = given.strip()
    try:
        value = json.loads(text if text.startswith("{") else Path(given).expanduser().read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"--deepspeed {given}: broken JSON at {where}, {error.msg}; mend it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed {given}: no JSON ({first_line(error)}); give a JSON file in UTF-8") from None
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"--deepspeed {given}: {reason}; give a JSON file, or --engine zero1, zero2 or zero3") from None
    if not isinstance(value, dict):
        raise UserError(f"--deepspeed {given}: a {type(value).__name__}, wanted an object of DeepSpeed's settings; mend it")


def spare_deepspeed_trouble() -> None:
    """Keeps DeepSpeed on a CPU from two things that take long. Has to come before its engine.

    Its all-reduce in shared memory, which only tensor-parallel inference calls: every new environment would compile it, with
    g++ and for most of a minute. And, where torchrun starts it, a process of numactl for each gradient, to count its devices.
    """
    import deepspeed  # here, because most runs do without it

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as its own launcher does


def activate_fsdp(trainer) -> None:
    """Makes ``--fsdp`` mean FSDP2 on CPU too, where accelerate would ignore it and train with DDP.

    Raises:
        UserError: accelerate chose another engine.
    """
    args = trainer.args
    if not args.fsdp:
        return
    layers = decoder_layers(trainer.model, args.fsdp_config.get("transformer_layer_cls_to_wrap"))
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        options = args.fsdp_plugin_args | {"cpu_offload": False}  # all is on the CPU; offloading would pin memory
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
        # every new AcceleratorState copies PartialState's, so both have to know
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if state.distributed_type != DistributedType.FSDP:
        raise UserError(f"--fsdp was asked for, but accelerate chose {state.distributed_type}")
    plugin = state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = layers
    wrap_separately(trainer.model, plugin)
    fsdp_utils._find_final_norm = final_norm  # accelerate's own does not look into adapted and nested models
    if isinstance(trainer.model, PeftModel):
        keep_copies_tied(trainer.model)
    if args.bf16:  # accelerate's own policy would round the loss to bf16 and sum gradients in bf16
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if plugin.activation_checkpointing:  # accelerate's own would compute layers again with other dropout masks
        plugin.activation_checkpointing = False
        apply_activation_checkpointing(trainer.model, check_fn=lambda module: type(module).__name__ in layers)


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm before the output layer, which is in its unit: so the layer is whole where the loss reads it."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        return None
    body: Any = body_of(inner)
    decoder = body.get_decoder()
    return next((part for part in reversed(list(decoder.children())) if "Norm" in type(part).__name__), None)


def keep_copies_tied(model: PeftModel) -> None:
    """Has accelerate tie the copies of tied embeddings that peft trains, which transformers cannot."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(outer, ModulesToSaveWrapper) or inner.weight is not outer.weight:
        return

    def tie_weights() -> None:
        outer.original_module.weight = inner.original_module.weight
        for name, copied in outer.modules_to_save.items():
            copied.weight = inner.modules_to_save[name].weight

    model.__dict__["tie_weights"] = tie_weights


def decoder_layers(model: PreTrainedModel, named: list[str] | None = None) -> list[str]:
    """Classes of the layers that FSDP shards one by one: those named, the model's own list, or its largest stack's.

    Raises:
        UserError: a name that no layer has, or a model without a stack of layers of one class.
    """
    classes = {type(module).__name__ for module in model.modules()}
    own = sorted(set(model._no_split_modules or []) & classes)
    for name in named or []:
        if name not in classes:
            raise UserError(
                f"--fsdp_config transformer_layer_cls_to_wrap {name}: the model has no such layer; its own: {', '.join(own)}"
            )
    if named or own:
        return named or own
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len({*map(type, module)}) == 1]
    if not stacks:
        raise UserError(
            "--fsdp: no stack of layers in the model; name their class in --fsdp_config transformer_layer_cls_to_wrap"
        )
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return [type(next(iter(largest))).__name__]


def check_engine(trainer) -> None:
    """Raises UserError if an engine was asked for and another one, or none, is about to train."""
    args, active = trainer.args, active_engine(trainer.model_wrapped)
    wanted = args.engine
    if wanted is None and args.fsdp:
        wanted = "fsdp"
    elif wanted is None and args.deepspeed:  # whether a file of the user's own offloads is not asked
        stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
        wanted, active = f"zero{stage}", active.removesuffix("_offload")
    if wanted not in (None, active):
        raise UserError(f"the engine {wanted} was asked for, but the active one is {active}")
    if active == "ddp" and args.world_size > 2:
        add_one_by_one(trainer.model_wrapped)
    if active == "fsdp":
        check_separate(trainer.accelerator.unwrap_model(trainer.model))


def add_one_by_one(model: nn.Module) -> None:
    """Makes DDP sum each gradient by itself, one all-reduce per parameter, instead of bucket by bucket.

    Three ranks or more add in an order that depends on the place in the bucket, and DDP lays its buckets out anew after the
    first step of every start: a resumed run would differ in the last bits from one that was not interrupted.
    """
    ddp: Any = getattr(model, "_orig_mod", model)
    share = 1 / torch.distributed.get_world_size()

    def add(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer().mul_(share)
        sums = [torch.distributed.all_reduce(each, async_op=True).get_future() for each in bucket.gradients()]
        return torch.futures.collect_all(sums).then(lambda _: buffer)

    ddp.register_comm_hook(None, add)


def active_engine(model: nn.Module) -> str:
    """The name of what wraps a model that is ready to be trained."""
    inner: Any = getattr(model, "_orig_mod", model)  # of a compiled one
    if isinstance(model, FSDPModule) or isinstance(inner, FSDPModule):
        return "fsdp" if all(isinstance(parameter, DTensor) for parameter in model.parameters()) else "fsdp in part"
    if isinstance(inner, DistributedDataParallel):
        return "ddp"
    if hasattr(inner, "zero_optimization_stage"):  # DeepSpeed's engine, without importing DeepSpeed
        offloads = [getattr(inner.optimizer, name, False) for name in ("offload_optimizer", "offload_param")]
        return f"zero{inner.zero_optimization_stage()}" + ("_offload" if all(offloads) else "")
    return "none"


# dense 16-bit floating-point operations per second, from the manufacturer's data sheets; the first name that fits counts
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "RTX 6000 Ada": 364e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configurations call their number


def peak_flops() -> float | None:
    """What this rank's device can do at 16 bits, in FLOP/s, or None where that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def training_flops(model: PreTrainedModel) -> tuple[float, float]:
    """FLOPs of training on a sequence of n tokens, as (a, b) of a n + b n^2  (PaLM, arXiv 2204.02311, appendix B).

    6 (frozen: 4) per parameter that multiplies (all but the input embedding, unless it is the output layer as well; of a
    mixture's experts those that a token is sent to), and attention.
    """
    config = model.config.get_text_config()
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = sum(p.numel() for p in model.parameters()) - (0 if inputs is outputs else inputs.numel())
    experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), 0)
    if experts:
        routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        parameters -= routed * (experts - config.num_experts_per_tok) // experts
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    each = 6.0 if inputs.requires_grad else 4.0  # LoRA: what is frozen has no gradient of its own
    return each * parameters, 12.0 * config.num_hidden_layers * width


def peak_memory_mib() -> float:
    """The most memory this process has held: on the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
