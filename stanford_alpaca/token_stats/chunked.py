"""The reference in constant memory, pure PyTorch: a chunk of tokens at a time, gradients by hand.

Equals ``reference.linear_loss``. An objective sees two numbers per token, so its derivatives a = dL/dnll and
b = dL/dlog_emo are [chunk] vectors, and the gradient of the logits is

    dL/dz_i = a (p_i - [i = y]) + b (pi_i - p_i),   p = softmax(z),  pi = softmax(z + log c),  pi_y = 0

of which the target's entry is written as a expm1(-nll) - b p_y, since p_y - 1 would cancel. With soft targets tau_i stands for
[i = y], and pi_y is not 0; the entry of the most probable token is minus the sum of the others, which cancels nothing either.

When the loss is summed, the gradients are computed in the forward pass (three matrix products); with reduction "none" the
chunks are computed once more in the backward pass.
"""

import torch
from torch import Tensor

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.token_stats import Head, LossOfStats, SoftTargets, TokenStats, expected_drop, split

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}  # logits held at a time: 32 MiB and 512 MiB in float32


def linear_loss(
    hidden: Tensor,  # [N, H]
    head: Head,
    targets: Tensor | SoftTargets,  # [N]
    cost: CostEmbedding | None,
    objective: LossOfStats,
    reduction: str,  # "sum" or "none"
) -> tuple[Tensor, TokenStats]:
    """The loss, [] or [N], and the detached statistics. Extra memory: two or three [chunk, V] tensors in float32, the
    gradients (that of the weight in float32) and, under mixed precision, a copy of the weight."""
    job = _Job(head, targets, cost, objective)
    if torch.is_grad_enabled():
        loss, nll, log_emo = _ChunkedLoss.apply(hidden, head.weight, head.bias, job, reduction)
    else:
        out = job.run(hidden, head.weight, head.bias)
        loss, nll, log_emo = out.loss.sum() if reduction == "sum" else out.loss, out.nll, out.log_emo
    return loss, TokenStats(nll, log_emo if cost is not None else None)


class _Result:
    """What a pass over the chunks fills in, row by row."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = hidden.new_empty(hidden.shape[0], dtype=exact)
        self.loss, self.nll, self.log_emo = rows, torch.empty_like(rows), torch.empty_like(rows)
        self.d_hidden = torch.empty_like(hidden) if needs[0] else None
        self.d_weight = torch.zeros_like(weight, dtype=exact) if needs[1] else None  # accumulated in float32
        self.d_bias = torch.zeros_like(bias, dtype=exact) if needs[2] and bias is not None else None


class _Job:
    """The arguments of one loss that are not differentiated, and the pass over its chunks."""

    def __init__(self, head: Head, targets: Tensor | SoftTargets, cost: CostEmbedding | None, objective: LossOfStats):
        self.softcap, self.logit_scale = head.softcap, head.logit_scale
        self.targets, self.rest = split(targets)
        self.cost, self.objective = cost, objective

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool] = (False, False, False),  # gradients of hidden, weight, bias
        token_weights: Tensor | None = None,  # [N] gradient that arrives at each token's loss; None for ones
    ) -> _Result:
        out = _Result(hidden, weight, bias, needs)
        weight = weight.to(hidden.dtype)
        device = hidden.device.type
        step = max(16, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            self._chunk(hidden[rows], weight, bias, rows, out, None if token_weights is None else token_weights[rows])
        return out

    def _logits(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = h @ weight.T
        z = z if z.dtype == torch.float64 else z.float()
        if bias is not None:
            z += bias
        if self.logit_scale is not None:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def _chunk(self, h, weight, bias, rows, out, token_weights) -> None:
        y = self.targets[rows][:, None]  # [n, 1]
        rest = None if self.rest is None else SoftTargets(self.rest.ids[rows], self.rest.probs[rows])
        z = self._logits(h, weight, bias)  # [n, V]
        z_y = z.gather(1, y)
        log_z = z.logsumexp(1, keepdim=True)
        others = z.scatter_(1, y, torch.finfo(z.dtype).min).logsumexp(1, keepdim=True)
        z.scatter_(1, y, z_y)
        margin = (others - z_y).squeeze(1)
        nll = torch.logaddexp(margin, torch.zeros_like(margin))
        if rest is not None:
            nll += expected_drop(z, z_y, rest)

        log_emo = w = log_w = None
        if self.cost is not None:
            w = self.cost.costs(y.squeeze(1), z.shape[1], rest).log_().to(z.dtype).add_(z)  # z + log c
            log_w = w.logsumexp(1, keepdim=True)
            log_emo = (log_w - log_z).squeeze(1)  # -inf where nothing costs anything
            out.log_emo[rows] = log_emo
        out.nll[rows] = nll
        loss, a, b = _derivatives(self.objective, nll, log_emo)
        out.loss[rows] = loss
        if out.d_hidden is None and out.d_weight is None and out.d_bias is None:
            return
        if token_weights is not None:
            a, b = a * token_weights, b * token_weights

        # dL/dz, written over z
        z_scale = None if self.softcap is None else 1 - (z / self.softcap) ** 2
        g = z.sub_(log_z).exp_().mul_((a - b)[:, None])
        if w is not None and log_w is not None:
            pi = w.sub_(torch.where(log_w > -torch.inf, log_w, 0)).exp_()
            g.add_(pi.mul_(b[:, None]))
        if rest is None:
            p_y = (z_y - log_z).exp_()
            g.scatter_(1, y, a[:, None] * torch.expm1(-nll)[:, None] - b[:, None] * p_y)
        else:
            g.scatter_add_(1, rest.ids, -a[:, None] * rest.probs).scatter_(1, y, 0)
            g.scatter_(1, y, -g.sum(1, keepdim=True))
        self._through_head(g, z_scale, h, weight, rows, out)

    def _through_head(self, g: Tensor, z_scale: Tensor | None, h: Tensor, weight: Tensor, rows: slice, out: _Result) -> None:
        if z_scale is not None:
            g *= z_scale
        if self.logit_scale is not None:
            g *= self.logit_scale
        if out.d_bias is not None:
            out.d_bias += g.sum(0)
        g = g.to(h.dtype)
        if out.d_hidden is not None:
            torch.matmul(g, weight, out=out.d_hidden[rows])
        if out.d_weight is not None:
            _accumulate(out.d_weight, g, h)


def _accumulate(total: Tensor, g: Tensor, h: Tensor) -> None:  # total [V, H] += g.T @ h
    if total.dtype == h.dtype:
        total.addmm_(g.T, h)
    else:
        total.add_(g.T @ h)


def _derivatives(objective: LossOfStats, nll: Tensor, log_emo: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token and its derivatives by nll and by log emo, all [n]; b is 0 where emo is 0."""
    with torch.enable_grad():
        leaves = [nll.detach().requires_grad_()]
        if log_emo is not None:
            leaves.append(log_emo.detach().requires_grad_())
        loss = objective(leaves[0], leaves[1] if log_emo is not None else None)
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True) if loss.requires_grad else [None] * 2
    a, b = grads[0], grads[1] if log_emo is not None else None
    a = torch.zeros_like(nll) if a is None else a
    b = torch.zeros_like(nll) if b is None else b
    return loss.detach(), a, b


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, job, reduction):
        ctx.job, ctx.reduction = job, reduction
        needs = tuple(ctx.needs_input_grad[:3])
        if reduction == "sum":
            out = job.run(hidden, weight, bias, needs)
            ctx.grads = [None if g is None else g.to(x.dtype) for g, x in _pairs(out, hidden, weight, bias)]
            loss = out.loss.sum()
        else:
            out = job.run(hidden, weight, bias)
            ctx.save_for_backward(hidden, weight, bias)
            loss = out.loss
        ctx.mark_non_differentiable(out.nll, out.log_emo)
        return loss, out.nll, out.log_emo

    @staticmethod
    def backward(ctx, *upstream):
        grad = upstream[0]
        if ctx.reduction == "sum":
            if ctx.grads is None:
                raise RuntimeError("backward a second time: the gradients were freed after the first")
            grads = [None if g is None else g.mul_(grad) for g in ctx.grads]
            ctx.grads = None  # a second backward is an error, as for any freed graph
        else:
            hidden, weight, bias = ctx.saved_tensors
            out = ctx.job.run(hidden, weight, bias, tuple(ctx.needs_input_grad[:3]), grad)
            grads = [None if g is None else g.to(x.dtype) for g, x in _pairs(out, hidden, weight, bias)]
        return *grads, None, None


def _pairs(out: _Result, hidden: Tensor, weight: Tensor, bias: Tensor | None):
    return zip((out.d_hidden, out.d_weight, out.d_bias), (hidden, weight, bias), strict=True)
