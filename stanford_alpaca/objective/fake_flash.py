"""A stand-in for FlashAttention, which needs a GPU and 16 bits.

With it, a model can be probed where it is loaded: on the CPU, in float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def uses_flash(model: PreTrainedModel) -> bool:
    """Whether the model's attention is any version of FlashAttention."""
    return "flash" in (model.config._attn_implementation or "")


@contextlib.contextmanager
def emulated_flash(model: PreTrainedModel) -> Iterator[None]:
    """Replaces FlashAttention by ``varlen_attention`` while the block runs.

    It works on any device and in any dtype. Models with another attention are left alone.
    """
    name = model.config._attn_implementation
    if not uses_flash(model):
        yield
        return
    ALL_ATTENTION_FUNCTIONS[name] = varlen_attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, heads, S, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,  # [examples + 1]
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention within each row, or within each example.

    ``cu_seq_lens_q`` says where examples begin and end in the concatenated rows.
    """
    rows, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    query, key, value = (
        x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (query, key, value)
    )
    places = torch.arange(rows * length, device=query.device)
    example = torch.searchsorted(cu_seq_lens_q.to(query.device), places, right=True)
    mask = (example[:, None] == example) & (places[:, None] >= places)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1).unflatten(0, (rows, length)), None
