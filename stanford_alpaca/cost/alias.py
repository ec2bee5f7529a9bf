"""A cosine cost that reads weights kept elsewhere and never copies them."""

from collections.abc import Callable

import torch
from torch import Tensor

from stanford_alpaca.cost.embedding import (
    TILE,
    CostEmbedding,
    cut_noise,
    full_precision,
    inverse_norms,
)


class CostAlias(CostEmbedding):
    """The cosine CostEmbedding of the [V, D] weight that ``weight()`` returns.

    The weight has to be the same at every call. The alias keeps 1 / norm of each row, [V], but no
    rows. It serves an output layer that is not trained, wherever and in whatever precision an
    engine keeps it. Its costs differ from those of ``CostEmbedding(weight())`` only by rounding.
    """

    def __init__(self, weight: Callable[[], Tensor]):
        self.kind, self._weight = "cosine", weight
        self.directed = self._cached = self._cache = None
        # [V], computed at the first use: until then the weight may be on the meta device
        self._inverse: Tensor | None = None

    @property
    def rows(self) -> Tensor:  # type: ignore[override]  # [V, D], not of unit length
        return self._weight().detach()

    def to(self, device: torch.device | str) -> "CostAlias":
        """Changes nothing: the weight stays where it is."""
        return self

    def _compute(self, tokens: Tensor) -> Tensor:
        weight = self.rows
        if self._inverse is None or self._inverse.device != weight.device:
            self._inverse = inverse_norms(weight)
        inverse = self._inverse
        towards = weight[tokens].to(inverse.dtype).mul_(inverse[tokens, None])
        with full_precision(weight.device.type):
            if weight.dtype == inverse.dtype:
                cosines = towards @ weight.T
            else:
                cosines = torch.cat(
                    [towards @ tile.to(inverse.dtype).T for tile in weight.split(TILE)], dim=1
                )
        return cut_noise(cosines.mul_(inverse).neg_().add_(1))

    def _expected_costs(
        self, targets: Tensor, ids: Tensor, probs: Tensor, vocab_size: int
    ) -> Tensor:
        # the products in it need rows of unit length
        return CostEmbedding(self.rows, check_finite=False)._expected_costs(
            targets, ids, probs, vocab_size
        )
