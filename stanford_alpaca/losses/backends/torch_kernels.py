"""All work on [n, V] except the matrix products, in PyTorch: statistics and logits' gradient.

Both are sums of non-negative terms over the tokens other than the target y, so nothing cancels
where the model is confident. The softmax over these tokens, q, is all that is kept of the logits.
Logarithms of the costs are taken only in rows whose sums underflow.
"""

import torch
from torch import Tensor

from stanford_alpaca.cost import CostRows
from stanford_alpaca.losses.types import Draws, Head

CHUNK_LOGITS = {"cpu": 3 * 2**23, "cuda": 2**27}  # logits held at a time: 96 and 512 MiB in float32
SLICE_LOGITS = {"cpu": 2**22, "cuda": 2**25}  # logits that a ``Chunk`` is made for at a time
COLUMNS = None  # a chunk is sized for as many logits per token as the weight has rows
# sums below this, relative to the sum of the other tokens, may have lost terms to underflow
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
        self._underflown: tuple[Tensor, Tensor] | None = None  # rows and their z - top + log c

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
        # finite, so that the softmax is too if all other logits are -inf
        lowest = torch.finfo(self._z.dtype).min
        z = self._z.scatter_(1, self._y, lowest)
        self.top = z.amax(1)
        self._q = z.softmax(1)
        # q of the greatest logit is 1 / sum_i exp(z_i - top)
        self._others = torch.where(self.top == lowest, -torch.inf, -self._q.amax(1).log())
        return z_y - self.top, self._others, None if self._costs is None else self._log_w(z)

    def _log_w(self, z: Tensor) -> Tensor:
        table, which = self._unique_costs()
        if z.is_cuda:  # a product could run in TF32 there, and the statistics are exact
            w = torch.mul(self._q, table[which]).sum(1)
        else:  # different targets are few
            w = (self._q @ table.T).gather(1, which[:, None]).squeeze(1)
        log_w = w.log() + self._others
        lost = (w < UNDERFLOW).nonzero().squeeze(1)
        if len(lost):  # sums that are 0 or have underflowed are computed again with logarithms
            logs = table[which[lost]].log_().add_(z[lost] - self.top[lost, None])
            log_w[lost] = logs.logsumexp(1)
            self._underflown = lost, logs
        return torch.where(self._others == -torch.inf, -torch.inf, log_w)

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
        q, g = self._q, self._z
        scale, share = self._factors(others, log_w, alpha, beta)
        if share is None or log_w is None:
            torch.mul(q, scale[:, None], out=g)
        else:
            if self._underflown is not None:
                share[self._underflown[0]] = 0.0
            table, which = self._unique_costs()
            torch.addcmul(scale[:, None], share[:, None], table[which], out=g).mul_(q)
            if self._underflown is not None:
                lost, logs = self._underflown
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
        if self._underflown is not None:
            self.gradient(*whole)
            return None
        q, unit = self._q, abs(self._head.logit_scale or 1.0)
        scale, share = self._factors(others, log_w, alpha, beta)
        most = scale.abs()
        if share is not None:
            table, which = self._unique_costs()
            most = torch.maximum(most, (scale + share * table.amax(1)[which]).abs())
        bound = torch.mul(q, (unit * most)[:, None], out=self._z).amax(0)
        bound.scatter_reduce_(0, self._y.squeeze(1), (unit * g_y).abs(), "amax")
        drawn = draws.draw(bound)
        if drawn is None:
            self.gradient(*whole)
            return None
        columns, factor = drawn
        g = q.index_select(1, columns)
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
        """Returns what q and c q are multiplied with, [n]; no second one without costs."""
        own = self._others
        scale = torch.where(own > -torch.inf, alpha * torch.exp(own - others), 0.0)
        if self._costs is None or log_w is None:
            return scale, None
        return scale, torch.where(beta != 0, beta * torch.exp(own - log_w), 0.0)

    def _unique_costs(self) -> tuple[Tensor, Tensor]:
        """Returns the costs [u, V] of the different targets, and which is whose, [n]."""
        if self._read is None:
            assert self._costs is not None
            used, which = self._costs.which.unique(return_inverse=True)
            self._read = self._costs.table[used].to(self._z.dtype), which
        return self._read
