"""Compares the Triton kernels, and the whole loss on them, with float64.

The float64 side is written here by the definitions and shares no code with the package. The kernels
get logits as they are, so they have to be right to float32's last digits. The whole loss rounds its
logits to bfloat16, so it may have twice the error that the same formulas in torch have.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.figures import Figures, Setting, main
from stanford_alpaca.cost import CostEmbedding, CostRows
from stanford_alpaca.losses import linear_emo_loss
from stanford_alpaca.losses.backends import triton_kernels
from stanford_alpaca.losses.types import Head

VOCABULARIES = (32_000, 262_144, 50_257)
TOY_VOCABULARIES = (192, 257)
MODES = ("mle", "emo", "emo2", "emd")
KINDS = ("cosine", "identity")
BF16 = torch.finfo(torch.bfloat16).eps


def run(setting: Setting, figures: Figures) -> None:
    """Checks the kernels for every vocabulary, then the whole loss."""
    vocabularies = TOY_VOCABULARIES if setting.toy else VOCABULARIES
    if setting.toy:
        triton_kernels.BLOCK = 64  # the interpreter merges lanes one by one
    for vocab in vocabularies:
        for full in (False, True):
            what = f"kernels, V {vocab}{', bias, scale and cap' if full else ''}"
            figures.attempt(what, partial(kernels, vocab, full, what, setting, figures))
    for vocab in vocabularies:
        for mode in MODES:
            for kind in KINDS if mode != "mle" else ("no",):
                what = f"loss, V {vocab}, {mode}, {kind} cost"
                figures.attempt(what, partial(loss, vocab, mode, kind, what, setting, figures))


# ---- the kernels, from logits --------------------------------------------------------------------


def kernels(vocab: int, full: bool, what: str, setting: Setting, figures: Figures) -> None:
    """Adds the worst errors of statistics and gradient, each over what is allowed."""
    torch.manual_seed(0)
    n, device = 4 if setting.toy else 64, setting.device
    product = (3 * torch.randn(n, vocab, device=device)).bfloat16()
    targets = torch.randint(vocab, (n,), device=device)
    head = Head(None)
    if full:
        head = Head(None, torch.randn(vocab, device=device).bfloat16(), logit_scale=0.7, softcap=9)
    table = torch.rand(3, vocab, device=device)
    table[:, ::5] = 0
    for costs in (None, CostRows(table, torch.arange(n, device=device) % 3)):
        x = product.double().requires_grad_()
        z = transformed(x, head)
        chunk = triton_kernels.Chunk(product.clone(), head, targets, costs)
        gap, others, log_w = chunk.statistics()
        y = targets[:, None]
        rest = z.scatter(1, y, -torch.inf)
        top = rest.detach().amax(1)
        want = {
            "gap": (gap, z.gather(1, y)[:, 0] - top),
            "others": (others, rest.logsumexp(1) - top),
        }
        if costs is not None:
            paid = rest + costs.table[costs.which].double().log()
            want["log w"] = (log_w, paid.logsumexp(1) - top)
        worst = max(
            ((got.double() - w).abs() / (1 + w.abs())).max().item() for got, w in want.values()
        )
        scale = torch.randn(3, n, device=device)
        alpha, beta, g_y = scale
        got = chunk.gradient(others, log_w, alpha, beta if costs is not None else None, g_y)
        p = torch.softmax(rest.detach(), 1) * alpha[:, None].double()
        if costs is not None:
            p += torch.softmax(paid.detach(), 1) * beta[:, None].double()
        z.backward(p.scatter(1, y, g_y[:, None].double()))
        assert x.grad is not None
        off = (got.double() - x.grad).abs()
        # the interpreter truncates to bfloat16; alpha and beta may cancel
        allowed = BF16 * x.grad.abs() + 1e-6 * (1 + scale.abs().max().item())
        name = f"{what}, {'no' if costs is None else 'some'} costs"
        figures.add(f"{name}: statistics", worst, "of 1e-5", ok=worst < 1e-5)
        share = (off / allowed).max().item()
        figures.add(f"{name}: gradient", share, "of what bf16 allows", ok=share <= 1)


def transformed(x: Tensor, head: Head) -> Tensor:
    z = x if head.bias is None else x + head.bias.double()
    z = z if head.logit_scale is None else z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


# ---- the whole loss ------------------------------------------------------------------------------


def loss(vocab: int, mode: str, kind: str, what: str, setting: Setting, figures: Figures) -> None:
    """Adds the relative errors of loss and gradients, those of torch in bfloat16 in brackets."""
    torch.manual_seed(0)
    n, width, device = (6, 16, "cpu") if setting.toy else (64, 256, "cuda")
    hidden = (2.5 * torch.randn(n, width, device=device)).bfloat16()
    weight = (torch.randn(vocab, width, device=device) / width**0.5).bfloat16()
    targets = torch.randint(vocab, (n,), device=device)
    hidden[::2] += (6 * weight[targets[::2]]).bfloat16()  # every other token is nearly sure
    cost = None if kind == "no" else CostEmbedding(None if kind == "identity" else weight, kind)
    costs = None if kind == "no" else naive_costs(weight, targets, kind)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_emo_loss(h, w, targets, cost, mode=mode, backend="triton")

    def naive(h: Tensor, w: Tensor) -> Tensor:
        logits = h @ w.T
        exact = logits.dtype if logits.dtype == torch.float64 else torch.float32
        return naive_loss(logits.to(exact), targets, costs, mode)

    exact = gradients(naive, hidden.double(), weight.double())
    mine, theirs = (
        [
            relative(got, want)
            for got, want in zip(gradients(each, hidden, weight), exact, strict=True)
        ]
        for each in (ours, naive)
    )
    least = (1e-3, 1e-4, 1e-4)
    worst = max(a / (2 * b + c) for a, b, c in zip(mine, theirs, least, strict=True))
    notes = (
        f"{name} {a:.0e} ({b:.0e})"
        for name, a, b in zip(("loss", "d hidden", "d weight"), mine, theirs, strict=True)
    )
    figures.add(what, worst, "of what is allowed", ", ".join(notes), ok=worst <= 1)


def naive_costs(weight: Tensor, targets: Tensor, kind: str) -> Tensor:  # [n, V] float64
    if kind == "identity":
        costs = torch.ones(len(targets), len(weight), dtype=torch.float64, device=weight.device)
    else:
        rows = weight.double()
        rows = rows / rows.norm(dim=1, keepdim=True)
        costs = 1 - rows[targets] @ rows.T
        costs[costs < 1e-6] = 0
    return costs.scatter(1, targets[:, None], 0.0)


def naive_loss(logits: Tensor, targets: Tensor, costs: Tensor | None, mode: str) -> Tensor:
    """Computes the objectives by their definitions (EMO paper, section 3.3)."""
    log_p = torch.log_softmax(logits, 1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    if mode == "mle" or costs is None:
        return nll.mean()
    emo = (log_p.exp() * costs.to(log_p.dtype)).sum(1)
    if mode == "emo":
        return (0.5 * (nll + (nll / emo).detach() * emo)).mean()
    return (emo if mode == "emd" else (emo / nll).detach() * nll + emo).mean()


def gradients(loss: Callable[..., Tensor], *given: Tensor) -> list[Any]:
    """Returns the loss and its gradients by hidden states and weight."""
    leaves = [each.detach().clone().requires_grad_() for each in given]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(each.grad for each in leaves)]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


if __name__ == "__main__":
    main(run)
