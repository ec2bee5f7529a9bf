"""The specification: statistics from materialised logits, differentiated by autograd.

Everything stays in log space. The published implementations compute 1 - <sum_i p_i e_i, e_y>, which
subtracts nearly equal numbers as soon as the model is confident. Here, once the costs are given, no
subtraction cancels:

    nll     = log(1 + exp(logsumexp_{i != y}(z_i) - z_y))
    log emo = logsumexp_i(z_i + log c_i) - logsumexp_i(z_i)

With soft targets, c_i = sum_j tau_j c_ij, y is the most probable token of tau, and nll gets the
additional term sum_j tau_j (z_y - z_j).
"""

import torch
from torch import Tensor

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses.types import (
    Head,
    LossOfStats,
    SoftTargets,
    TokenStats,
    expected_drop,
    split_targets,
)


def token_stats(
    logits: Tensor,  # [N, V] float32 or float64; lower precisions are raised to float32
    targets: Tensor | SoftTargets,  # [N] token ids, or distributions
    cost: CostEmbedding | None,
) -> TokenStats:
    """Returns nll and, if a cost is given, log emo of every token. Differentiable in the logits.

    If no token with a cost above 0 has any probability, emo is 0: log emo is -inf, without a
    gradient.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    targets, rest = split_targets(targets)
    column = targets[:, None]
    others = z.scatter(1, column, torch.finfo(z.dtype).min)
    margin = others.logsumexp(1) - z.gather(1, column).squeeze(1)
    nll = torch.logaddexp(margin, torch.zeros_like(margin))
    if rest is not None:
        nll = nll + expected_drop(z.gather(1, rest.ids), z.gather(1, column).squeeze(1), rest)
        # c_y is above 0 now, and autograd's gradient of z_y, pi_y - p_y, would cancel. With logits
        # relative to z_y, it is minus the sum of the other logits' gradients.
        z = (z - z.gather(1, column)).scatter(1, column, 0.0)
    if cost is None:
        return TokenStats(nll, None)

    z = z - z.detach().amax(1, keepdim=True)  # exp(z - logsumexp) is as exact as z is small
    costs = cost.costs(targets, z.shape[1], rest).to(z.dtype)  # [N, V]
    costly = (costs > 0) & (z != -torch.inf)  # NaN stays NaN
    free = ~costly.any(dim=1)  # no token with a cost has any probability
    weighted = torch.where(costly, z + costs.log(), -torch.inf)
    # keeps the gradient of free rows finite
    weighted = torch.where(free[:, None], torch.zeros_like(z), weighted)
    log_emo = weighted.logsumexp(1) - z.logsumexp(1)
    return TokenStats(nll, torch.where(free, -torch.inf, log_emo))


def logits_of(hidden: Tensor, head: Head) -> Tensor:  # [N, H] -> [N, V] in the dtype of hidden
    """Returns the logits of an output layer, computed in the dtype of ``hidden``."""
    logits = hidden @ head.weight.to(hidden.dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(hidden.dtype)
    if head.logit_scale is not None:
        logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def linear_loss(
    hidden: Tensor,  # [N, H] rows of supervised tokens
    head: Head,
    targets: Tensor | SoftTargets,  # [N]
    cost: CostEmbedding | None,
    objective: LossOfStats,
    reduction: str,  # "sum" or "none"
    token_weights: Tensor | None = None,  # [N] constants that multiply the losses
) -> tuple[Tensor, TokenStats]:
    """Returns the loss, [] or [N], and the detached statistics."""
    stats = token_stats(logits_of(hidden, head), targets, cost)
    loss = objective(*stats)
    loss = loss if token_weights is None else loss * token_weights
    log_emo = None if stats.log_emo is None else stats.log_emo.detach()
    return loss.sum() if reduction == "sum" else loss, TokenStats(stats.nll.detach(), log_emo)
