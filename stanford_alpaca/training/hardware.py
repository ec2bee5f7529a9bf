"""The peak FLOP/s of a device, the FLOPs that training takes, and the memory it took."""

import resource

import torch
from transformers import PreTrainedModel

# dense 16-bit floating-point operations per second, from the manufacturer's data sheets; the first
# name that matches counts
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# how model configurations call the number of their experts
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def peak_flops() -> float | None:
    """Returns the peak FLOP/s of this rank's device at 16 bits, or None if it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def training_flops(model: PreTrainedModel) -> tuple[float, float]:
    """Returns (a, b): training on a sequence of n tokens takes a n + b n^2 FLOPs.

    The source is PaLM, arXiv 2204.02311, appendix B. The first term has 6 FLOPs for each parameter
    that multiplies, or 4 if the weights are frozen. The input embedding does not multiply, unless
    it is the output layer as well. Of a mixture of experts, only those count that a token is sent
    to. The second term is attention.
    """
    config = model.config.get_text_config()
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = sum(p.numel() for p in model.parameters()) - (
        0 if inputs is outputs else inputs.numel()
    )
    experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), 0)
    if experts:
        routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        parameters -= routed * (experts - config.num_experts_per_tok) // experts
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    each = 6.0 if inputs.requires_grad else 4.0  # LoRA: frozen weights get no gradient
    return each * parameters, 12.0 * config.num_hidden_layers * width


def peak_memory_mib() -> float:
    """Returns the most memory, in MiB, that this process has held: on a GPU, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
