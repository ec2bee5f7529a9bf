"""What a loss needs from a transport cost, wherever its rows are."""

from typing import Protocol

import torch
from torch import Tensor

from stanford_alpaca.cost.cache import CostRows


class Cost(Protocol):
    """A transport cost between tokens.

    It is whole (``CostEmbedding``), or this rank's part (``ShardedCost``).
    """

    @property
    def rows(self) -> Tensor | None:
        """[V, D] directions, or this rank's rows of them; None where every other token costs 1."""

    def to(self, device: torch.device | str) -> "Cost":
        """Moves the cost to another device, in place, and returns it."""

    def check(self, vocab_size: int) -> None:
        """Raises ValueError unless there is a row for each token."""

    def unique_rows(self, targets: Tensor) -> CostRows | None:  # [n]
        """Returns the costs of each different target, and which of them each target has."""
