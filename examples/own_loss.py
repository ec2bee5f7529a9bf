"""Losses of one's own, for ``--loss examples/own_loss.py:focal``; see docs/own_loss.md."""

import torch
from torch import Tensor


def focal(nll: Tensor, log_emo: Tensor) -> Tensor:  # [N], [N] -> [N]
    """The focal loss (arXiv 1708.02002), gamma 2: (1 - p_y)^2 nll."""
    return torch.expm1(-nll).square() * nll


def near(nll: Tensor, log_emo: Tensor) -> Tensor:  # [N], [N] -> [N]
    """nll, weighted less where the model's mass is near the target: sg(emo / (1 - p_y)) nll."""
    mean_cost = torch.exp(log_emo - torch.log(-torch.expm1(-nll)))
    return mean_cost.nan_to_num(0.0).detach() * nll
