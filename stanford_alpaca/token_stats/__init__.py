"""Backends that compute the two numbers per token on which every objective rests, and their gradients.

A backend is one function ``linear_loss(hidden, head, targets, cost, objective, reduction)`` that equals
``reference.linear_loss``; ``reference`` materialises the logits and is the specification.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """The statistics of N supervised tokens, float32 (float64 if the logits are)."""

    nll: Tensor  # [N] negative log-likelihood of the target, in nats
    log_emo: Tensor | None  # [N] log of the expected transport cost sum_i p_i c_i; -inf where it is 0; None if not asked for


class Head(NamedTuple):
    """The output layer: z = softcap(logit_scale * (hidden @ weight.T + bias)), softcap(x) = s tanh(x / s)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float | None = None


LossOfStats = Callable[[Tensor, "Tensor | None"], Tensor]  # ([N] nll, [N] log_emo) -> [N] loss
