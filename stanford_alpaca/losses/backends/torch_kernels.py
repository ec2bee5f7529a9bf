"""All work on [n, V] except the matrix products, in PyTorch: statistics and logits' gradient.

Both are sums of non-negative terms over the tokens other than the target y, so nothing cancels
where the model is confident. One exponential per logit is enough. Logarithms of the costs are taken
only in rows whose sums underflow.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stanford_alpaca.cost import CostRows
from stanford_alpaca.losses.types import Draws, Head

CHUNK_LOGITS = {"cpu": 3 * 2**23, "cuda": 2**27}  # logits held at a time: 96 and 512 MiB in float32
SLICE_LOGITS = {"cpu": 2**23}  # logits whose columns are sampled together, if fewer than a chunk
COLUMNS = None  # a chunk is sized for as many logits per token as the weight has rows
# logits worked on at a time: on a CPU, as many as stay in its caches
CACHE_LOGITS = {"cpu": 2**23, "cuda": 2**25}
# sums below this, relative to exp of the greatest other logit, may have lost terms to underflow
UNDERFLOW = 1e-25


class Chunk:
    """The logits z = softcap(logit_scale * (product + bias)) of n tokens.

    They are float32, or float64 if the product is. The methods have to be called in this order:
    ``at``, if needed, then ``statistics``, then ``gradient``. Each overwrites what the one before
    has used.
    """

    def __init__(
        self,
        product: Tensor,  # [n, V] hidden @ weight.T; it is overwritten
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
        # [n, V], computed before z is overwritten
        self._slope: Tensor | None = None if head.softcap is None else head.slope(z)
        self._read: tuple[Tensor, Tensor] | None = None  # see _unique_costs
        self._underflown: list[tuple[Tensor, Tensor]] = []  # rows and their z - top + log c

    def at(self, ids: Tensor) -> Tensor:  # [n, k] -> [n, k]
        """Returns the logits of these tokens. Has to be called before ``statistics``."""
        return self._z.gather(1, ids)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns ``gap``, ``others`` and ``log_w``, all [n].

            gap     z_y
            others  log sum_{i != y} exp z_i
            log_w   log sum_{i != y} c_i exp z_i, or None without costs

        All are relative to ``top``, the greatest z_i other than z_y, so they keep their digits
        however large the logits are. ``others`` is -inf if all other logits are -inf. ``log_w`` is
        -inf if this holds for all other tokens with a cost.
        """
        z_y = self._z.gather(1, self._y).squeeze(1)
        z = self._z.scatter_(1, self._y, -torch.inf)
        self.top, total, log_w = (torch.empty_like(z_y) for _ in range(3))
        top = self.top
        for rows in self._slices():
            # finite even if all other logits are -inf
            top[rows] = z[rows].amax(1).clamp_min_(torch.finfo(z.dtype).min)
            shifted = z[rows] - top[rows, None]
            e = torch.exp(shifted, out=z[rows])
            total[rows] = e.sum(1)
            if self._costs is not None:
                log_w[rows] = self._log_w(rows, e, shifted)
        return z_y - top, total.log_(), None if self._costs is None else log_w

    def _log_w(self, rows: slice, e: Tensor, shifted: Tensor) -> Tensor:
        table, which = self._unique_costs(rows)
        if e.is_cuda:  # a product could run in TF32 there, and the statistics are exact
            w = torch.mul(e, table[which]).sum(1)
        else:  # different targets are few
            w = (e @ table.T).gather(1, which[:, None]).squeeze(1)
        lost = (w < UNDERFLOW).nonzero().squeeze(1)
        log_w = w.log()
        if len(lost):  # sums that are 0 or have underflowed are computed again with logarithms
            logs = table[which[lost]].log_().add_(shifted[lost])
            log_w[lost] = logs.logsumexp(1)
            self._underflown.append((rows.start + lost, logs))
        return log_w

    def gradient(
        self,
        others: Tensor,  # [n] as ``statistics`` returns it
        log_w: Tensor | None,  # [n] as ``statistics`` returns it, or greater
        alpha: Tensor,  # [n]
        beta: Tensor,  # [n]; 0 where log_w is -inf
        g_y: Tensor,  # [n]
    ) -> Tensor:  # [n, V] the product, overwritten
        """Returns the gradient for the product.

        Entry y is g_y dz_y / dproduct_y. Any other entry i is
        (alpha exp(z_i - others) + beta c_i exp(z_i - log_w)) dz_i / dproduct_i.
        Without costs, log_w and beta are not read.
        """
        g = self._z
        scale, share = self._factors(others, log_w, alpha, beta)
        if share is None or log_w is None:
            g.mul_(scale[:, None])
        else:
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

    def sample(
        self,
        draws: Draws,
        others: Tensor,
        log_w: Tensor | None,
        alpha: Tensor,
        beta: Tensor,
        g_y: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Returns drawn columns [k] of what ``gradient`` returns, and their entries [n, k], scaled.

        Only these are computed. A column is drawn by a bound of its entries, in which the greatest
        cost of a row takes the place of each. Where columns are not drawn, it returns None, and
        the product is overwritten as ``gradient`` does it.
        """
        whole = others, log_w, alpha, beta, g_y
        if self._underflown:
            self.gradient(*whole)
            return None
        e, unit = self._z, abs(self._head.logit_scale or 1.0)
        scale, share = self._factors(others, log_w, alpha, beta)
        most = scale.abs()
        if share is not None:
            table, which = self._unique_costs(slice(None))
            most = torch.maximum(most, (scale + share * table.amax(1)[which]).abs())
        bound = (e * (unit * most)[:, None]).amax(0)
        bound.scatter_reduce_(0, self._y.squeeze(1), (unit * g_y).abs(), "amax")
        drawn = draws.draw(bound)
        if drawn is None:
            self.gradient(*whole)
            return None
        columns, factor = drawn
        g = e.index_select(1, columns)
        if share is None:
            g *= scale[:, None]
        else:
            costs = table.index_select(1, columns)[which]
            g *= costs.mul_(share[:, None]).add_(scale[:, None])
        token, place = (columns == self._y).nonzero(as_tuple=True)  # where a target is drawn
        g[token, place] = g_y[token]
        if self._slope is not None:
            g *= self._slope.index_select(1, columns)
        elif self._head.logit_scale is not None:
            g *= self._head.logit_scale
        return columns, (g * factor).to(self._product.dtype)

    def _factors(
        self, others: Tensor, log_w: Tensor | None, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what e and c e are multiplied with, [n]; no second one without costs."""
        scale = torch.where(others > -torch.inf, alpha * torch.exp(-others), 0.0)
        if self._costs is None or log_w is None:
            return scale, None
        return scale, torch.where(beta != 0, beta * torch.exp(-log_w), 0.0)

    def _unique_costs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns the costs [u, V] of the different targets of these rows, and which is whose."""
        assert self._costs is not None
        whose = self._costs.which[rows]
        if self._read is None or len(self._read[1]) != len(whose) or len(whose) != len(self._z):
            used, which = whose.unique(return_inverse=True)
            self._read = self._costs.table[used].to(self._z.dtype), which
        return self._read

    def _slices(self) -> Iterator[slice]:
        n, vocab_size = self._z.shape
        step = max(1, CACHE_LOGITS.get(self._z.device.type, CACHE_LOGITS["cuda"]) // vocab_size)
        return (slice(start, min(start + step, n)) for start in range(0, n, step))

    def _costs_of(self, rows: slice) -> Tensor:  # [b, V], a new tensor
        assert self._costs is not None
        return self._costs.table.index_select(0, self._costs.which[rows]).to(self._z.dtype)
