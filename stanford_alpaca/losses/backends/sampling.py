"""Unbiased sparse gradients of the output layer: a few columns stand for all.

On a trained model nearly all entries of the logits' gradient g [n, V] are nearly zero, and two of
the three matrix products of the output layer are spent on them. Here those products run on a sample
of g's columns. Let m_j be the greatest |g_ij| of column j over the n tokens of a chunk, or a bound
of it, and epsilon the threshold:

    m_j >= epsilon    the column is kept as it is
    m_j <  epsilon    it is kept with probability m_j / epsilon, and then times epsilon / m_j

The expectation of the sample g^ is g, entry by entry. What is linear in g^, as the gradients of
hidden states and weight, is unbiased too. No entry of a kept column exceeds epsilon by the scaling,
so with w_j the rows of the weight

    Var(d hidden_ik) <= epsilon sum_j |g_ij| w_jk^2

Squares are not unbiased: E |g^|^2 is |g|^2 plus the variance. The norm of the gradients, which
clipping reads, and Adam's second moment see that.

Column j is drawn with a level of its own, uniform at the start of a call. Every chunk adds m_j /
epsilon to it; where it reaches 1 the column is kept and 1 is subtracted (systematic sampling,
Madow 1949). Each chunk keeps the column with the probability above, and chunks err in opposite
directions, so their sum varies less than that of independent draws. No chunk needs random numbers
of its own.

A chunk is multiplied whole if the sample would be expected to have more than DENSE of the columns.
That follows from g alone, never from what was drawn, and no sample is cut off: either would bias
it. A column with an entry that is not finite is always multiplied, so the entry is seen.

Sampling columns and rows of a matrix product by their size is from Drineas, Kannan and Mahoney
(2006, doi 10.1137/S0097539704442684). Cut cross-entropy (arXiv 2411.09009) leaves entries below
2^-12 out altogether, which is biased.
"""

import threading
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

EPSILON = 2**-12
DENSE = 0.5  # share of the columns from which on products with all of them are faster
_lock = threading.Lock()  # of all seeds: threads may share them
SMALLEST = 1e-30  # keeps the threshold above 0 in float32


class Sampled(NamedTuple):
    """Asks for sampled gradients.

    Attributes:
        epsilon: the threshold, in units of the loss of one token.
        seed: of the random numbers. The same seed on the same chunks draws the same.
    """

    epsilon: float = EPSILON
    seed: int = 0


@dataclass
class Seeds:
    """The seeds of a run's samples: from its seed, the rank, the step and the call in the step.

    A resumed run that tells the step draws what an uninterrupted one does. Nobody has to tell it:
    the calls then count on.
    """

    seed: int = 0
    step: int = 0
    call: int = 0

    def at(self, step: int) -> None:
        """Says which step the next call is in. The first call of a step is number 0."""
        if step != self.step:
            self.step, self.call = step, 0

    def next(self) -> int:
        rank = dist.get_rank() if dist.is_initialized() else 0
        with _lock:
            place = f"{self.seed}/{rank}/{self.step}/{self.call}"
            self.call += 1
        return int.from_bytes(blake2b(place.encode(), digest_size=7).digest())


class Columns:
    """Draws the columns of the chunks of one call, one chunk after the other."""

    def __init__(self, sampled: Sampled, count: int, device: torch.device, unit: Tensor | float):
        """Starts with new levels.

        Args:
            count: the number of columns, V.
            unit: the greatest factor between the loss of a token and the logits' gradient: the
                logits' scale times the gradient that arrives.
        """
        generator = torch.Generator(device).manual_seed(sampled.seed)
        self._level = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
        unit = torch.as_tensor(unit, dtype=torch.float32, device=device).abs()
        self._epsilon = (sampled.epsilon * unit).clamp_min(SMALLEST)

    def draw(self, bound: Tensor) -> tuple[Tensor, Tensor] | None:
        """Draws columns by their greatest entries, or by bounds of these, [V].

        Returns the numbers [k] of the columns, ascending, and what their entries are multiplied
        with. Returns None if all columns are to be multiplied.
        """
        chance = bound.float().div(self._epsilon).clamp_max_(1)
        # not the other way round, because of NaN
        if not chance.sum(dtype=torch.float64) <= DENSE * len(chance):
            return None
        self._level += chance
        columns = (self._level >= 1).nonzero().squeeze(1)
        self._level[columns] -= 1
        return columns, 1 / chance[columns]

    def sample(
        self,
        g: Tensor,
        greatest: Tensor | None = None,  # [V] the greatest |g_ij| of each column, if known
    ) -> tuple[Tensor, Tensor] | None:
        """Returns drawn columns [k] of ``g`` [n, V] and their entries [n, k], scaled, or None."""
        if greatest is None:
            greatest = torch.maximum(g.amax(0), g.amin(0).neg_())
        drawn = self.draw(greatest)
        if drawn is None:
            return None
        columns, factor = drawn
        return columns, (g.index_select(1, columns) * factor).to(g.dtype)
