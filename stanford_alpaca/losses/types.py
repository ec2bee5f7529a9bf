"""Backends that compute the two numbers per token on which every objective rests, and their gradients.

A backend is one function ``linear_loss(hidden, head, targets, cost, objective, reduction)`` that equals
``reference.linear_loss``; ``reference`` materialises the logits and is the specification.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stanford_alpaca.cost import CostRows


class TokenStats(NamedTuple):
    """The statistics of N supervised tokens, float32 (float64 if the logits are)."""

    nll: Tensor  # [N] negative log-likelihood of the target, in nats; expected under soft targets
    log_emo: (
        Tensor | None
    )  # [N] log of the expected transport cost sum_i p_i c_i; -inf where it is 0; None if not asked for


class SoftTargets(NamedTuple):
    """A distribution tau over k tokens in place of each target, such as the top k of a teacher.

    The statistics become their expectations: nll = sum_j tau_j nll_j and emo = sum_ij p_i tau_j c_ij. The latter is the upper
    bound of the distance between p and tau: it is smallest where p is one token, that of least expected cost, NOT at p = tau.
    """

    ids: Tensor  # [N, k] token ids; repeated ones add up
    probs: Tensor  # [N, k] in the dtype of the statistics; every row sums to 1


class Head(NamedTuple):
    """The output layer: z = softcap(logit_scale * (hidden @ weight.T + bias)), softcap(x) = s tanh(x / s)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float | None = None

    def slope(self, z: Tensor) -> Tensor:
        """How much the logits z, of any shape, move with hidden @ weight.T."""
        slope = (
            torch.ones_like(z)
            if self.softcap is None
            else (z / self.softcap).square_().neg_().add_(1)
        )
        return slope if self.logit_scale is None else slope.mul_(self.logit_scale)


class Chunk(Protocol):
    """The logits of n tokens, in float32 (float64 if the product is): what touches [n, V] beside the matrix products."""

    top: Tensor  # [n] the greatest logit of the others, once ``statistics`` was called

    def at(self, ids: Tensor) -> Tensor:  # [n, k] -> [n, k]
        """The logits of these tokens; to be asked for first."""

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``torch_kernels.Chunk.statistics``."""

    def gradient(
        self, others: Tensor, log_w: Tensor | None, alpha: Tensor, beta: Tensor, g_y: Tensor
    ) -> Tensor:  # [n, V]
        """See ``torch_kernels.Chunk.gradient``."""


class Kernels(Protocol):
    """A module, or an object, that makes chunks."""

    @property
    def CHUNK_LOGITS(self) -> Mapping[str, int]:
        """By the type of a device: how many logits are held at a time."""

    @property
    def COLUMNS(self) -> int | None:
        """Logits of a token that a chunk is sized for, if not the rows of the weight."""

    @property
    def Chunk(self) -> Callable[[Tensor, Head, Tensor, CostRows | None], Chunk]:
        """Makes one of a product [n, V], the output layer, the targets [n] and the rows of their costs."""


LossOfStats = Callable[[Tensor, "Tensor | None"], Tensor]  # ([N] nll, [N] log_emo) -> [N] loss


def split_targets(targets: "Tensor | SoftTargets") -> "tuple[Tensor, SoftTargets | None]":
    """The targets [N] and no rest; if soft, the most probable tokens [N] and the rest: what tau gives to other tokens.

    Written relative to the most probable token, nothing cancels when model and teacher are both confident.
    """
    if not isinstance(targets, SoftTargets):
        return targets, None
    top = targets.ids.gather(1, targets.probs.argmax(1, keepdim=True))  # [N, 1]
    return top.squeeze(1), SoftTargets(
        targets.ids, torch.where(targets.ids == top, 0.0, targets.probs)
    )


def expected_drop(
    z_rest: Tensor,  # [N, k] the logits at rest.ids
    z_top: Tensor,  # [N] those of the most probable tokens
    rest: SoftTargets,
) -> Tensor:  # [N]
    """sum_j tau_j (z_top - z_j): by how much the expected nll exceeds that of the most probable token."""
    drop = torch.where(rest.probs > 0, z_top[:, None] - z_rest, 0.0)  # a masked logit times 0 is 0
    return (rest.probs * drop).sum(1)
