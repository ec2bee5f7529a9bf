"""Runs a model once with known token ids, to see what it does."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stanford_alpaca.errors import first_line
from stanford_alpaca.objective.fake_flash import emulated_flash


@contextlib.contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Keeps the model in evaluation mode and without gradients while the block runs.

    FlashAttention is emulated. The training modes are restored at the end. Any error in the block
    becomes a ValueError.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), emulated_flash(model):
            yield
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be probed with token ids alone: {first_line(error)}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:  # [1, 4] each
    """Returns the tokens that a model is probed with."""
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
