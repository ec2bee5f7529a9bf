"""The loss in chunks of tokens, with gradients computed by hand.

Equals ``reference.linear_loss``, but the memory for logits does not grow with the number of tokens.
An objective sees two numbers per token, so its derivatives a = dL/dnll and b = dL/dlog_emo are
[chunk] vectors. Let others and w be the sums over i != y of exp z_i and of c_i exp z_i, and let
m = log others - z_y. Then:

    nll     = softplus(m)
    log emo = log w - log others + logsigmoid(m)
    p_i     = exp(z_i) / others * sigmoid(m)
    pi_i    = c_i exp(z_i) / w
    dL/dz_i = (a - b) p_i + b pi_i
    dL/dz_y = -a sigmoid(m) - b sigmoid(-m)

With soft targets, y is the most probable token. What tau gives to other tokens is subtracted from
their gradients, and c_y is not 0.

A ``Chunk``, from torch_kernels.py or triton_kernels.py, does all work on [chunk, V] except the
matrix products. When the loss is summed, the gradients are computed in the forward pass (three
matrix products, or two small ones in place of two, see sampling.py). In two cases the chunks are
computed again in the backward pass: with reduction "none", and in float16, whose range needs the
loss scale that arrives only then. Tokens are processed in the order of their targets, so that equal
targets, which share a row of costs, stand together.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stanford_alpaca.cost import Cost, CostEmbedding, CostRows
from stanford_alpaca.losses.backends import torch_kernels
from stanford_alpaca.losses.backends.autograd import first_derivatives
from stanford_alpaca.losses.backends.sampling import Columns, Sampled
from stanford_alpaca.losses.types import (
    Head,
    Kernels,
    LossOfStats,
    SoftTargets,
    TokenStats,
    expected_drop,
    split_targets,
)

# entries of the weight's gradient that are computed at a time in a lower precision
TILE_PRODUCTS = 2**25
GROUP = 256  # tokens whose sampled columns are multiplied together
LEAST_SAMPLED = 256  # tokens of a chunk whose gradients are sampled, however large V is


def linear_loss(
    hidden: Tensor,  # [N, H]
    head: Head,
    targets: Tensor | SoftTargets,  # [N]
    cost: Cost | None,
    objective: LossOfStats,
    reduction: str,  # "sum" or "none"
    token_weights: Tensor | None = None,  # [N] constants that multiply the losses
    kernels: Kernels = torch_kernels,
    sampled: Sampled | None = None,  # gradients are exact without it
) -> tuple[Tensor, TokenStats]:
    """Returns the loss, [] or [N], and the detached statistics.

    Extra memory: two or three [chunk, V] tensors in float32, the gradients (the weight's in
    float32) and, under mixed precision, a copy of the weight.
    """
    job = _Job(head, targets, cost, objective, token_weights, kernels, sampled)
    if torch.is_grad_enabled():
        loss, nll, log_emo = _ChunkedLoss.apply(hidden, head.weight, head.bias, job, reduction)
    else:
        out = job.run(hidden, head.weight, head.bias)
        loss, nll, log_emo = (
            out.loss.sum() if reduction == "sum" else out.loss,
            out.nll,
            out.log_emo,
        )
    return loss, TokenStats(nll, log_emo if cost is not None else None)


class _Result:
    """The results of a pass over the chunks, filled in row by row."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = hidden.new_empty(hidden.shape[0], dtype=exact)
        self.loss, self.nll, self.log_emo = rows, torch.empty_like(rows), torch.empty_like(rows)
        self.d_hidden = torch.empty_like(hidden) if needs[0] else None
        # accumulated in float32
        self.d_weight = torch.zeros_like(weight, dtype=exact) if needs[1] else None
        self.d_bias = torch.zeros_like(bias, dtype=exact) if needs[2] and bias is not None else None
        self.learning = any(g is not None for g in (self.d_hidden, self.d_weight, self.d_bias))


class _Job:
    """The arguments of a loss that are not differentiated, and the pass over its chunks."""

    def __init__(
        self,
        head: Head,
        targets: Tensor | SoftTargets,
        cost: Cost | None,
        objective: LossOfStats,
        token_weights: Tensor | None,
        kernels: Kernels,
        sampled: Sampled | None,
    ) -> None:
        self.sampled = sampled
        self.softcap, self.logit_scale = head.softcap, head.logit_scale
        self.columns = kernels.COLUMNS or len(head.weight)
        self.targets, self.rest = split_targets(targets)
        self.cost, self.objective, self.token_weights, self.kernels = (
            cost,
            objective,
            token_weights,
            kernels,
        )
        # equal targets share a row of costs
        shared = cost is not None and cost.rows is not None and self.rest is None
        self.order = (
            self.targets.argsort(stable=True)
            if shared
            else torch.arange(len(self.targets), device=self.targets.device)
        )

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool] = (False, False, False),  # gradients of hidden, weight, bias
        # [N] the gradient that arrives at each token's loss; None for ones
        upstream: Tensor | None = None,
    ) -> _Result:
        out = _Result(hidden, weight, bias, needs)
        head = Head(weight.to(hidden.dtype), bias, self.softcap, self.logit_scale)
        draws = self._draws(head.weight, upstream) if out.learning else None
        limits, device = self.kernels.CHUNK_LOGITS, hidden.device.type
        least = 16 if draws is None else LEAST_SAMPLED
        most = max(least, limits.get(device, limits["cuda"]) // self.columns)
        chunks = max(1, math.ceil(len(hidden) / most))
        # chunks of nearly equal size, in the same memory
        size = max(1, math.ceil(len(hidden) / chunks))
        logits = hidden.new_empty(min(size, len(hidden)), len(head.weight))
        for rows in self.order.split(size):
            h = hidden[rows]
            product = torch.mm(h, head.weight.T, out=logits[: len(h)])
            self._chunk(product, h, head, rows, out, upstream, draws)
        return out

    def _draws(self, weight: Tensor, upstream: Tensor | None) -> Columns | None:
        if self.sampled is None or not len(self.targets):
            return None
        unit = 1.0 if self.logit_scale is None else self.logit_scale
        return Columns(
            self.sampled,
            len(weight),
            weight.device,
            unit if upstream is None else unit * upstream.abs().max(),
        )

    def _chunk(
        self,
        product: Tensor,
        h: Tensor,
        head: Head,
        rows: Tensor,
        out: _Result,
        upstream: Tensor | None,
        draws: Columns | None,
    ) -> None:
        """Computes what follows from the product of these rows, slice by slice."""
        costs = self._costs(rows, len(head.weight))
        step, whole = max(1, len(rows)), []  # whole: the slices without a sample
        drawn = _Drawn(h, head.weight, rows, out)
        limit = self.kernels.SLICE_LOGITS.get(h.device.type)
        if limit is not None:
            step = max(1, limit // self.columns)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            own = None if costs is None else CostRows(costs.table, costs.which[part])
            sample = self._gradient(product[part], head, rows[part], own, out, upstream, draws)
            if sample is None:
                whole.append(part)
            else:
                drawn.add(part, *sample)
        drawn.multiply()
        for part in _joined(whole) if out.learning else ():
            _through_head(product[part], h[part], head.weight, rows[part], out)

    def _gradient(
        self,
        product: Tensor,
        head: Head,
        rows: Tensor,
        costs: CostRows | None,
        out: _Result,
        upstream: Tensor | None,
        draws: Columns | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Fills in losses and statistics, and returns a sample of the product's gradient.

        Without a sample it overwrites the product by its gradient, if there are gradients.
        """
        y = self.targets[rows]
        rest = self._rest(rows)
        chunk = self.kernels.Chunk(product, head, y, costs)
        z_y = chunk.at(y[:, None])
        z_rest = z_y if rest is None else chunk.at(rest.ids)
        gap, others, log_w = chunk.statistics()
        margin = others - gap
        nll = -logsigmoid(-margin)
        if rest is not None:
            nll += expected_drop(z_rest, z_y.squeeze(1), rest)

        log_emo = log_w_all = None
        if self.cost is not None:
            log_w = others if log_w is None else log_w  # identity: every other token costs 1
            log_w_all = log_w
            if rest is not None and costs is not None:
                at_target = costs.table[costs.which, y].to(gap.dtype)
                log_w_all = torch.logaddexp(log_w, gap + at_target.log())
            log_emo = torch.where(  # NaN stays NaN
                log_w_all == -torch.inf, -torch.inf, log_w_all - others + logsigmoid(margin)
            )
            out.log_emo[rows] = log_emo
        out.nll[rows] = nll
        weights = None if self.token_weights is None else self.token_weights[rows]
        if not out.learning:
            loss = self.objective(nll, log_emo)
            out.loss[rows] = loss if weights is None else loss * weights
            return None
        out.loss[rows], a, b = _derivatives(self.objective, nll, log_emo, weights)
        if upstream is not None:
            a, b = a * upstream[rows], b * upstream[rows]

        p_others, p_y = margin.sigmoid(), (-margin).sigmoid()
        g_y = -a * p_others - b * p_y
        alpha = (a - b) * p_others if costs is not None else -g_y
        if rest is not None:  # minus the sum of the other logits' gradients, tau's share included
            g_y = a * rest.probs.sum(1) - alpha
            if log_w is not None and log_w_all is not None:
                g_y -= torch.where(b != 0, b * torch.exp(log_w - log_w_all), 0.0)
        if rest is None and draws is not None:
            return chunk.sample(draws, others, log_w_all, alpha, b, g_y)
        g = chunk.gradient(others, log_w_all, alpha, b, g_y)
        if rest is None:
            return None
        g.scatter_add_(1, rest.ids, (-a[:, None] * rest.probs * head.slope(z_rest)).to(g.dtype))
        return None if draws is None else draws.sample(g)

    def _rest(self, rows: Tensor) -> SoftTargets | None:
        """Returns what soft targets give to other tokens than the most probable ones."""
        if self.rest is None:
            return None
        return SoftTargets(self.rest.ids[rows], self.rest.probs[rows])

    def _costs(self, rows: Tensor, vocab_size: int) -> CostRows | None:
        y, rest = self.targets[rows], self._rest(rows)
        if self.cost is None or rest is None:
            return None if self.cost is None else self.cost.unique_rows(y)
        assert isinstance(self.cost, CostEmbedding)  # vocab_parallel.py refuses soft targets
        return CostRows(self.cost.costs(y, vocab_size, rest), torch.arange(len(y), device=y.device))


def _through_head(g: Tensor, h: Tensor, weight: Tensor, rows: Tensor, out: _Result) -> None:
    if out.d_bias is not None:
        out.d_bias += g.sum(0, dtype=out.d_bias.dtype)
    if out.d_hidden is not None:
        out.d_hidden[rows] = g @ weight
    if out.d_weight is None:
        return
    if out.d_weight.dtype == h.dtype:
        out.d_weight.addmm_(g.T, h)
    else:  # multiply in the lower precision, accumulate in the higher one
        step = max(1, TILE_PRODUCTS // h.shape[1])
        for tile in range(0, len(weight), step):
            out.d_weight[tile : tile + step] += g[:, tile : tile + step].T @ h


class _Drawn:
    """Samples of the slices of a chunk, multiplied with weight and hidden states in groups.

    A group has the columns that any of its slices has.
    """

    def __init__(self, h: Tensor, weight: Tensor, rows: Tensor, out: _Result) -> None:
        self._h, self._weight, self._rows, self._out = h, weight, rows, out
        self._parts: list[slice] = []
        self._columns: list[Tensor] = []
        self._entries: list[Tensor] = []

    def add(self, part: slice, columns: Tensor, entries: Tensor) -> None:
        if self._parts and self._parts[-1].stop != part.start:
            self.multiply()
        self._parts.append(part)
        self._columns.append(columns)
        self._entries.append(entries)
        if part.stop - self._parts[0].start >= GROUP:
            self.multiply()

    def multiply(self) -> None:
        if not self._parts:
            return
        columns = self._columns[0]
        sample = self._entries[0]
        if len(self._parts) > 1:
            columns = torch.cat(self._columns).unique()
            first = self._parts[0].start
            count = sum(len(entries) for entries in self._entries)
            sample = sample.new_zeros(count, len(columns))
            for part, own, entries in zip(self._parts, self._columns, self._entries, strict=True):
                place = torch.searchsorted(columns, own)
                sample[part.start - first : part.stop - first].index_copy_(1, place, entries)
        group = slice(self._parts[0].start, self._parts[-1].stop)
        h, out = self._h[group], self._out
        if out.d_bias is not None:
            out.d_bias.index_add_(0, columns, sample.sum(0, dtype=out.d_bias.dtype))
        if out.d_hidden is not None:
            out.d_hidden[self._rows[group]] = sample @ torch.embedding(self._weight, columns)
        if out.d_weight is not None:
            out.d_weight.index_add_(0, columns, (sample.T @ h).to(out.d_weight.dtype))
        self._parts, self._columns, self._entries = [], [], []


def _joined(parts: list[slice]) -> list[slice]:
    """Joins slices that follow each other."""
    joined: list[slice] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return joined


def _derivatives(
    objective: LossOfStats, nll: Tensor, log_emo: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each token's loss and its derivatives a by nll and b by log emo, all [n].

    b is 0 where emo is 0.
    """
    with torch.enable_grad():
        leaves = [nll.detach().requires_grad_()]
        if log_emo is not None:
            leaves.append(log_emo.detach().requires_grad_())
        loss = objective(leaves[0], leaves[1] if log_emo is not None else None)
        loss = loss if weights is None else loss * weights
        grads = (
            torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
            if loss.requires_grad
            else [None] * 2
        )
    a, b = grads[0], grads[1] if log_emo is not None else None
    a = torch.zeros_like(nll) if a is None else a
    b = torch.zeros_like(nll) if b is None else b
    return loss.detach(), a, b


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, reduction: str
    ) -> tuple:
        ctx.job = job
        ctx.early = reduction == "sum" and hidden.dtype != torch.float16
        if ctx.early:
            out = job.run(hidden, weight, bias, tuple(ctx.needs_input_grad[:3]))
            ctx.grads = [
                None if g is None else g.to(x.dtype) for g, x in _pairs(out, hidden, weight, bias)
            ]
        else:
            out = job.run(hidden, weight, bias)
            ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(out.nll, out.log_emo)
        return out.loss.sum() if reduction == "sum" else out.loss, out.nll, out.log_emo

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        grad = upstream[0]
        if ctx.early:
            if ctx.grads is None:
                raise RuntimeError(
                    "backward a second time: the gradients were freed after the first"
                )
            grads = [None if g is None else g.mul_(grad) for g in ctx.grads]
            ctx.grads = None  # a second backward is an error, as for any freed graph
        else:
            hidden, weight, bias = ctx.saved_tensors
            out = ctx.job.run(
                hidden, weight, bias, tuple(ctx.needs_input_grad[:3]), grad.expand(len(hidden))
            )
            grads = [
                None if g is None else g.to(x.dtype) for g, x in _pairs(out, hidden, weight, bias)
            ]
        return *grads, None, None


def _pairs(out: _Result, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple]:
    return zip((out.d_hidden, out.d_weight, out.d_bias), (hidden, weight, bias), strict=True)
