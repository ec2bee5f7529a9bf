"""The types that the backends share.

A backend computes the two numbers per token on which every objective rests, and their gradients. It
is one function ``linear_loss(hidden, head, targets, cost, objective, reduction)`` that equals
``reference.linear_loss``. ``reference`` materialises the logits and is the specification.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stanford_alpaca.cost import CostRows


class TokenStats(NamedTuple):
    """The statistics of N supervised tokens, float32 (float64 if the logits are)."""

    nll: Tensor  # [N] negative log-likelihood of the target, in nats; expected under soft targets
    # [N] log of the expected transport cost sum_i p_i c_i; -inf where it is 0; None without a cost
    log_emo: Tensor | None


class SoftTargets(NamedTuple):
    """A distribution tau over k tokens in place of each target, such as the top k of a teacher.

    The statistics become expectations: nll = sum_j tau_j nll_j and emo = sum_ij p_i tau_j c_ij.
    This emo is an upper bound of the distance between p and tau. It is smallest where p is one
    token, the token of least expected cost, NOT at p = tau.
    """

    ids: Tensor  # [N, k] token ids; the probabilities of repeated ids add up
    probs: Tensor  # [N, k] in the dtype of the statistics; every row sums to 1


class Head(NamedTuple):
    """The output layer: z = softcap(logit_scale * (hidden @ weight.T + bias)).

    Here softcap(x) = s tanh(x / s), where s is the field ``softcap``.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float | None = None

    def slope(self, z: Tensor) -> Tensor:
        """Returns the derivative of the logits z, of any shape, by hidden @ weight.T."""
        slope = (
            torch.ones_like(z)
            if self.softcap is None
            else (z / self.softcap).square_().neg_().add_(1)
        )
        return slope if self.logit_scale is None else slope.mul_(self.logit_scale)


class Draws(Protocol):
    """Draws columns of the gradient of a chunk's logits: ``sampling.Columns``."""

    def draw(self, bound: Tensor) -> tuple[Tensor, Tensor] | None:  # [V] -> [k], [k]
        """See ``sampling.Columns.draw``."""

    def sample(  # [n, V] and [V] -> [k], [n, k]
        self, g: Tensor, greatest: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """See ``sampling.Columns.sample``."""


class Chunk(Protocol):
    """The logits of n tokens, in float32 (float64 if the product is).

    A chunk does all work on [n, V] tensors except the matrix products.
    """

    top: Tensor  # [n] the greatest logit other than the target's, set by ``statistics``

    def at(self, ids: Tensor) -> Tensor:  # [n, k] -> [n, k]
        """Returns the logits of these tokens. Has to be called before the other methods."""

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``torch_kernels.Chunk.statistics``."""

    def gradient(
        self, others: Tensor, log_w: Tensor | None, alpha: Tensor, beta: Tensor, g_y: Tensor
    ) -> Tensor:  # [n, V]
        """See ``torch_kernels.Chunk.gradient``."""

    def sample(
        self,
        draws: Draws,
        others: Tensor,
        log_w: Tensor | None,
        alpha: Tensor,
        beta: Tensor,
        g_y: Tensor,
    ) -> tuple[Tensor, Tensor] | None:  # [k], [n, k]
        """See ``torch_kernels.Chunk.sample``."""


class Kernels(Protocol):
    """A module, or an object, that makes chunks."""

    @property
    def CHUNK_LOGITS(self) -> Mapping[str, int]:
        """How many logits are held at a time, by device type."""

    @property
    def SLICE_LOGITS(self) -> Mapping[str, int]:
        """How many logits a ``Chunk`` is made for, by device type; else all that are held."""

    @property
    def COLUMNS(self) -> int | None:
        """Logits per token that a chunk is sized for; None: the number of the weight's rows."""

    @property
    def Chunk(self) -> Callable[[Tensor, Head, Tensor, CostRows | None], Chunk]:
        """Makes a chunk of a product [n, V], the output layer, targets [n] and their cost rows."""


LossOfStats = Callable[[Tensor, "Tensor | None"], Tensor]  # ([N] nll, [N] log_emo) -> [N] loss


def split_targets(targets: "Tensor | SoftTargets") -> "tuple[Tensor, SoftTargets | None]":
    """Splits soft targets into the most probable tokens [N] and the rest.

    The rest is the probability that tau gives to other tokens. Statistics are written relative to
    the most probable token, so nothing cancels when model and teacher are both confident. Token ids
    are returned as they are, with None for the rest.
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
    """Returns sum_j tau_j (z_top - z_j).

    This is how much the expected nll exceeds the nll of the most probable token.
    """
    # without ``where``, a masked logit (-inf) times 0 would be NaN
    drop = torch.where(rest.probs > 0, z_top[:, None] - z_rest, 0.0)
    return (rest.probs * drop).sum(1)
