"""Whether a model keeps apart the examples of one row, found by experiment: no class name and no configuration is asked."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stanford_alpaca.data.batching import SegmentCollator
from stanford_alpaca.errors import UserError
from stanford_alpaca.head import probing

SIZES = (5, 7, 3)  # tokens of the examples that a model is probed with
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the difference that seeing each other makes
ROUGH = 0.2  # the same at 16 bits


def find_isolation(model: PreTrainedModel, name: str = "model", means: str | None = None) -> str:
    """What the model keeps the examples of one row apart by, as ``SegmentCollator`` takes it: the first that works, or ``means``.

    FlashAttention is played by plain PyTorch that heeds what FlashAttention would be given, so no GPU is needed, and what is
    shown is that the model passes it on. Five short forward passes per try.

    Raises:
        UserError: by none: examples in one row would see each other or other positions, and the loss would not be theirs.
    """
    attention = model.config._attn_implementation
    own = {"sdpa": ["positions", "mask"], "eager": ["positions", "bias"]}.get(attention, ["positions"])
    tries = [means] if means is not None else ["cu_seq_lens"] if uses_flash(model) else own
    seen = []
    for each in tries:
        try:
            if isolates(model, each):
                return each
            seen.append("they see each other")
        except ValueError as error:
            seen.append(str(error))
    raise UserError(
        f"--packing and --padding_free: the {name} ({type(model).__name__}, attention {attention}) cannot keep apart the "
        f"examples of one row ({seen[0]}); try another --attn_implementation, or drop the flag"
    )


def uses_flash(model: PreTrainedModel) -> bool:
    """Whether the model's attention is a FlashAttention of any version."""
    return "flash" in (model.config._attn_implementation or "")


def isolates(model: PreTrainedModel, means: str) -> bool:
    """Whether three short examples have the hidden states in rows that they have apart. ValueError if the model cannot run."""
    config = model.config.get_text_config()
    if means in ("mask", "bias") and any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
        return False  # such a mask would have to know the window
    embedding = model.get_input_embeddings().weight
    tokens = torch.arange(sum(SIZES)).mul(7).remainder(embedding.shape[0])
    examples = [ids.tolist() for ids in tokens.split(SIZES)]
    both = {"input_ids": examples[0] + examples[1], "labels": [0] * sum(SIZES[:2]), "lengths": list(SIZES[:2])}
    batch = SegmentCollator(0, apart_by=means)([both, {"input_ids": examples[2], "labels": [0] * SIZES[2]}])
    del batch["labels"]
    batch = {key: value.to(embedding.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def hidden_of(ids: list[int]) -> Tensor:  # [len(ids), H]
        return model.base_model(input_ids=torch.tensor([ids], device=embedding.device), use_cache=False)[0][0].double()

    with probing(model), heeding_cu_seq_lens(model):
        apart = torch.cat([hidden_of(ids) for ids in examples])
        joined = hidden_of(tokens.tolist())
        rows = model.base_model(**batch)[0].double()
    packed = torch.cat([rows[0], rows[1, : SIZES[2]]])
    tolerance = TOLERANCE.get(embedding.dtype, ROUGH)
    return bool((packed - apart).norm() <= tolerance * (joined - apart).norm())


@contextlib.contextmanager
def heeding_cu_seq_lens(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model that would use FlashAttention uses ``varlen_attention``."""
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
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention, in each row, or within what ``cu_seq_lens_q`` keeps apart in the rows put one after the other."""
    rows, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    query, key, value = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (query, key, value))
    places = torch.arange(rows * length, device=query.device)
    example = torch.searchsorted(cu_seq_lens_q.to(query.device), places, right=True)
    mask = (example[:, None] == example) & (places[:, None] >= places)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1).unflatten(0, (rows, length)), None
