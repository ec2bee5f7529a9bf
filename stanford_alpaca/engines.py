"""Where a run computes: devices, ranks, FSDP2 also on CPU, memory."""

import atexit
import contextlib
import os
import resource
import sys
import warnings
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from stanford_alpaca.cost_sharding import check_separate, wrap_separately
from stanford_alpaca.errors import UserError


@contextlib.contextmanager
def loading_whole(args) -> Iterator[None]:
    """Within it a model is loaded whole on every rank, as FSDP does it too.

    Under ZeRO-3 transformers would load shards, and resizing, the probe of the output layer and the frozen cost would see
    empty weights. DeepSpeed shards the model when the Trainer hands it over.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None:  # DeepSpeed calls collectives by their old names, and torch says so every time
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def activate_fsdp(trainer) -> None:
    """Makes ``--fsdp`` mean FSDP2 on CPU too, where accelerate would ignore it and train with DDP.

    Raises:
        UserError: FSDP was asked for where there is nothing to shard over.
    """
    if not trainer.args.fsdp:
        return
    layers = {type(module).__name__ for module in trainer.model.modules()}
    for name in trainer.args.fsdp_config.get("transformer_layer_cls_to_wrap") or []:
        if name not in layers:
            own = ", ".join(sorted(trainer.model._no_split_modules or []))
            raise UserError(f"--fsdp_config transformer_layer_cls_to_wrap {name}: the model has no such layer; its own: {own}")
    if trainer.args.world_size == 1:
        raise UserError("--fsdp needs at least 2 processes: launch with torchrun, or drop the flag")
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        options = trainer.args.fsdp_plugin_args | {"cpu_offload": False}  # all is on the CPU; offloading would pin memory
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
        # every new AcceleratorState copies PartialState's, so both have to know
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if state.distributed_type != DistributedType.FSDP:
        raise UserError(f"--fsdp was asked for, but accelerate chose {state.distributed_type}")
    wrap_separately(trainer.model, state.fsdp_plugin)
    if isinstance(trainer.model, PeftModel):  # accelerate looks there for the final norm, in whose unit the output layer is
        trainer.model.__dict__["wrapped_decoder"] = trainer.model.get_base_model().base_model
        trainer.model.__dict__["base_model_prefix"] = "wrapped_decoder"
    if trainer.args.bf16:  # accelerate's own policy would round the loss to bf16 and sum gradients in bf16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        state.fsdp_plugin.mixed_precision_policy = policy


def check_fsdp(trainer) -> None:
    """Raises UserError if FSDP was asked for and the wrapped model is not sharded."""
    if trainer.args.fsdp and not isinstance(trainer.model_wrapped, FSDPModule):
        raise UserError(f"--fsdp was asked for, but the model is a {type(trainer.model_wrapped).__name__}")
    check_separate(trainer.accelerator.unwrap_model(trainer.model))


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


def leave_together() -> None:
    """Ends this process with status 0 when all ranks have come here. One barrier.

    The interpreter is not taken apart: a thread of gloo that still holds a tensor would then abort the process (see
    benchmarks/LOG.md). What asked to be called at the end is called.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
