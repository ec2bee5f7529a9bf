"""Finds out by experiment whether a model keeps apart the examples of one row.

The answer comes from short forward passes, not from class names.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stanford_alpaca.data.batching import SegmentCollator
from stanford_alpaca.errors import UserError
from stanford_alpaca.objective.fake_flash import uses_flash
from stanford_alpaca.objective.head import body_of
from stanford_alpaca.objective.probing import probing

SIZES = (5, 7, 3)  # tokens of the examples that a model is probed with
# relative to the difference that it makes if examples see each other
LEAK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUGH = 0.2  # the same at 16 bits


def find_isolation(model: PreTrainedModel, name: str = "model", means: str | None = None) -> str:
    """Finds how the model keeps apart the examples of one row (``SegmentCollator.apart_by``).

    Returns ``means`` if given and working, else the first means that works. Each try takes five
    short forward passes. If FlashAttention is emulated (see ``probing``), they show that the model
    passes on what FlashAttention has to be given.

    Raises:
        UserError: nothing works. Examples in one row would see each other or have wrong positions,
            so their loss would be wrong.
    """
    attention = model.config._attn_implementation
    own = {"sdpa": ["positions", "mask"], "eager": ["positions", "bias"]}.get(
        attention, ["positions"]
    )
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
        f"--packing and --padding_free: the {name} ({type(model).__name__}, attention {attention}) "
        f"cannot keep apart the examples of one row ({seen[0]}); try another "
        "--attn_implementation, or drop the flag"
    )


def isolates(model: PreTrainedModel, means: str) -> bool:
    """Whether three short examples have the same hidden states in shared rows as alone.

    Raises ValueError if the model cannot run.
    """
    config = model.config.get_text_config()
    if means in ("mask", "bias") and any(
        getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")
    ):
        return False  # the collator's masks know no window
    embedding = model.get_input_embeddings().weight
    tokens = torch.arange(sum(SIZES)).mul(7).remainder(embedding.shape[0])
    examples = [ids.tolist() for ids in tokens.split(SIZES)]
    both = {
        "input_ids": examples[0] + examples[1],
        "labels": [0] * sum(SIZES[:2]),
        "lengths": list(SIZES[:2]),
    }
    batch = SegmentCollator(0, apart_by=means)(
        [both, {"input_ids": examples[2], "labels": [0] * SIZES[2]}]
    )
    del batch["labels"]
    batch = {
        key: value.to(embedding.device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }

    def hidden_of(ids: list[int]) -> Tensor:  # [len(ids), H]
        return body_of(model)(
            input_ids=torch.tensor([ids], device=embedding.device), use_cache=False
        )[0][0].double()

    with probing(model):
        apart = torch.cat([hidden_of(ids) for ids in examples])
        joined = hidden_of(tokens.tolist())
        rows = body_of(model)(**batch)[0].double()
    packed = torch.cat([rows[0], rows[1, : SIZES[2]]])
    tolerance = LEAK_TOLERANCE.get(embedding.dtype, ROUGH)
    return bool((packed - apart).norm() <= tolerance * (joined - apart).norm())
