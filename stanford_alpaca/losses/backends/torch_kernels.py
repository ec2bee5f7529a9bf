"""What touches [n, V] beside the matrix products, in PyTorch: the statistics of n tokens and the gradient of their logits.

Both are sums over the tokens other than the target y, of terms that are not negative: nothing cancels where the model is sure.
One exponential per logit is all it takes, and no logarithm of the costs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stanford_alpaca.cost import CostRows
from stanford_alpaca.losses.types import Head

CHUNK_LOGITS = {"cpu": 3 * 2**23, "cuda": 2**27}  # held at a time: 96 MiB and 512 MiB in float32
COLUMNS = None  # a chunk is sized for the rows of the weight
CACHE_LOGITS = {
    "cpu": 2**20,
    "cuda": 2**25,
}  # worked on at a time: on a CPU what stays in its caches
UNDERFLOW = (
    1e-25  # relative to the greatest of the others: below it sums may have lost terms to underflow
)


class Chunk:
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
        self._product, self._z, self._y, self._costs, self._head = (
            product,
            z,
            targets[:, None],
            costs,
            head,
        )
        self._slope: Tensor | None = (
            None if head.softcap is None else head.slope(z)
        )  # [n, V], while z is there
        self._underflown: list[tuple[Tensor, Tensor]] = []  # rows, and their z + log c

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
        self.top, total, log_w = (torch.empty_like(z_y) for _ in range(3))
        top = self.top
        for rows in self._slices():
            top[rows] = (
                z[rows].amax(1).clamp_min_(torch.finfo(z.dtype).min)
            )  # finite even where there are no others
            shifted = z[rows] - top[rows, None]
            e = torch.exp(shifted, out=z[rows])
            total[rows] = e.sum(1)
            if self._costs is not None:
                log_w[rows] = self._log_w(rows, e, shifted)
        return z_y - top, total.log_(), None if self._costs is None else log_w

    def _log_w(self, rows: slice, e: Tensor, shifted: Tensor) -> Tensor:
        c = self._costs_of(rows)
        w = torch.mul(e, c).sum(1)
        lost = (w < UNDERFLOW).nonzero().squeeze(1)
        log_w = w.log_()
        if len(
            lost
        ):  # what costs anything is out of reach, or its exponentials are: once more with logarithms
            logs = c[lost].log_().add_(shifted[lost])
            log_w[lost] = logs.logsumexp(1)
            self._underflown.append((rows.start + lost, logs))
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
            share = torch.where(beta != 0, beta * torch.exp(-log_w), 0.0)
            for lost, _ in self._underflown:
                share[lost] = 0.0
            for rows in self._slices():
                g[rows].mul_(self._costs_of(rows).mul_(share[rows, None]).add_(scale[rows, None]))
            for lost, logs in self._underflown:
                safe = torch.where(log_w > -torch.inf, log_w, 0.0)[lost, None]
                g[lost] += beta[lost, None] * torch.exp(logs - safe)
        g.scatter_(1, self._y, g_y[:, None])
        if self._slope is not None:
            g.mul_(self._slope)
        elif self._head.logit_scale is not None:
            g.mul_(self._head.logit_scale)
        return g if g is self._product else self._product.copy_(g)

    def _slices(self) -> Iterator[slice]:
        n, vocab_size = self._z.shape
        step = max(1, CACHE_LOGITS.get(self._z.device.type, CACHE_LOGITS["cuda"]) // vocab_size)
        return (slice(start, min(start + step, n)) for start in range(0, n, step))

    def _costs_of(self, rows: slice) -> Tensor:  # [b, V], a new tensor
        assert self._costs is not None
        return self._costs.table.index_select(0, self._costs.which[rows]).to(self._z.dtype)
