"""Soft targets from another model: its k most probable next tokens in place of each target."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.losses.backends import reference
from stanford_alpaca.losses.types import SoftTargets
from stanford_alpaca.objective.head import LOGIT_ROWS, body_of, recognise_head


class Teacher:
    """A frozen causal LM of the same vocabulary.

    It is not part of the student: it is not trained, saved, wrapped or sharded. Every rank holds
    the whole of it.

    Args:
        model: any model that ``recognise_head`` serves. It is put into evaluation mode.
        top_k: tokens of a distribution. Their probabilities are divided by their sum.

    Raises:
        ValueError: a model whose logits cannot be computed from its output layer, or a top_k out of
            range.
    """

    def __init__(self, model: PreTrainedModel, top_k: int = 64):
        self.form = recognise_head(model)
        self.model, self.top_k = model.eval().requires_grad_(False), top_k
        rows = self.form.head(model).weight.shape[0]
        if not 1 <= top_k <= rows:
            raise ValueError(
                f"top_k is {top_k}: it has to lie between 1 and the teacher's {rows} tokens"
            )

    @torch.no_grad()
    def soft_targets(
        self,
        keep: Tensor,  # [B, S - 1] bool: the predicted positions to return distributions for
        vocab_size: int,  # the student's; further rows of the teacher, padding, are left out
        *args: Any,
        **inputs: Any,  # as the student's base model takes them
    ) -> SoftTargets:  # [N, k] for the N positions of keep
        """Returns the teacher's distributions over the next token, in float32."""
        self.model.to(keep.device)
        hidden = body_of(self.model)(*args, **inputs)[0][:, :-1][keep]
        head = self.form.head(self.model)
        ids, probs = [], []
        for rows in hidden.split(LOGIT_ROWS):
            logits = reference.logits_of(rows, head)[:, :vocab_size].float()
            top, found = logits.topk(min(self.top_k, logits.shape[1]))
            ids.append(found)
            probs.append(top.softmax(1))
        return SoftTargets(torch.cat(ids), torch.cat(probs))


def same_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the teacher has the same id for the student.

    The student may have more tokens, such as a padding token.
    """
    ids = student.get_vocab()
    return all(ids.get(token) == number for token, number in teacher.get_vocab().items())
