"""What touches [n, V] beside the matrix products, in PyTorch: the statistics of n tokens and the gradient of their logits.

Both are sums over the tokens other than the target y, of terms that are not negative: nothing cancels where the model is sure.
One exponential per logit is all it takes, and no logarithm of the costs.
"""

import torch
from torch import Tensor

from stanford_alpaca.cost import CostRows
from stanford_alpaca.token_stats import Head

CHUNK_LOGITS = {"cpu": 3 * 2**23, "cuda": 2**27}  # held at a time: 96 MiB and 512 MiB in float32
BLOCK_LOGITS = {"cpu": 2**20, "cuda": 2**25}  # worked on at a time: on a CPU what stays in its caches
UNDERFLOW = 1e-25  # relative to the greatest of the others: below it sums may have lost terms to underflow


class Block:
    """The logits z = softcap(logit_scale * (product + bias)) of n tokens, in float32 (float64 if the product is).

    ``at`` comes first, as needed, then ``statistics``, ``gradient`` last: each overwrites what the one before has left.
    """

    def __init__(
        self,
        product: Tensor,  # [n, V] hidden @ weight.T, which is overwritten
        head: Head,
        targets: Tensor,  # [n]
        costs: CostRows | None,
    ):
        z = product if product.dtype == torch.float64 else product.float()
        if head.bias is not None:
            z += head.bias
        if head.logit_scale is not None:
            z *= head.logit_scale
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        self._product, self._z, self._y, self._costs, self._head = product, z, targets[:, None], costs, head
        self._slope: Tensor | None = None if head.softcap is None else head.slope(z)  # [n, V], while z is there

    def at(self, ids: Tensor) -> Tensor:  # [n, k] -> [n, k]
        """The logits of these tokens; before ``statistics``."""
        return self._z.gather(1, ids)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``gap``: z_y, ``others``: log sum_{i != y} exp z_i and, with costs, ``log_w``: log sum_{i != y} c_i exp z_i; all [n].

        All are relative to the greatest z_i of the others, so that they keep their digits however large the logits are.
        ``others`` is -inf where there are no others, ``log_w`` where there are none that cost anything.
        """
        z_y = self._z.gather(1, self._y).squeeze(1)
        z = self._z.scatter_(1, self._y, -torch.inf)
        top = z.amax(1).clamp_min_(torch.finfo(z.dtype).min)  # finite even where there are no others
        shifted = z - top[:, None]
        e = torch.exp(shifted, out=z)
        return z_y - top, e.sum(1).log_(), self._log_w(e, shifted)

    def _log_w(self, e: Tensor, shifted: Tensor) -> Tensor | None:  # [n]
        if self._costs is None:
            return None
        c = self._costs_of_tokens()
        w = torch.mul(e, c).sum(1)
        self._lost = (w < UNDERFLOW).nonzero().squeeze(1)
        log_w = w.log_()
        if len(self._lost):  # what costs anything is out of reach, or its exponentials are: once more with logarithms
            self._logs = c[self._lost].log_().add_(shifted[self._lost])
            log_w[self._lost] = self._logs.logsumexp(1)
        return log_w

    def gradient(
        self,
        others: Tensor,  # [n] as from statistics
        log_w: Tensor | None,  # [n] as from statistics, or greater
        alpha: Tensor,  # [n]
        beta: Tensor,  # [n]; 0 where log_w is -inf
        g_y: Tensor,  # [n]
    ) -> Tensor:  # [n, V]: the product, overwritten
        """dz_i / dproduct_i times g_y for y, times alpha exp(z_i - others) + beta c_i exp(z_i - log_w) for the others.

        Without costs log_w and beta are not read.
        """
        g = self._z
        scale = torch.where(others > -torch.inf, alpha * torch.exp(-others), 0.0)
        if self._costs is None or log_w is None:
            g.mul_(scale[:, None])
        else:
            share = torch.where(beta != 0, beta * torch.exp(-log_w), 0.0).index_fill_(0, self._lost, 0.0)
            g.mul_(self._costs_of_tokens().mul_(share[:, None]).add_(scale[:, None]))
            if len(self._lost):
                safe = torch.where(log_w > -torch.inf, log_w, 0.0)[self._lost, None]
                g[self._lost] += beta[self._lost, None] * torch.exp(self._logs - safe)
        g.scatter_(1, self._y, g_y[:, None])
        if self._slope is not None:
            g.mul_(self._slope)
        elif self._head.logit_scale is not None:
            g.mul_(self._head.logit_scale)
        return g if g is self._product else self._product.copy_(g)

    def _costs_of_tokens(self) -> Tensor:  # [n, V], a new tensor
        assert self._costs is not None
        return self._costs.table.index_select(0, self._costs.which).to(self._z.dtype)
