"""The public loss functions: ``emo_loss`` from logits, ``linear_emo_loss`` from hidden states."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stanford_alpaca.cost import Cost, CostEmbedding, ShardedCost, as_cost
from stanford_alpaca.losses.backends import (
    chunked,
    reference,
    torch_kernels,
    triton_kernels,
    vocab_parallel,
)
from stanford_alpaca.losses.backends.sampling import EPSILON, Sampled
from stanford_alpaca.losses.objectives import Objective, as_objective
from stanford_alpaca.losses.types import Head, LossOfStats, SoftTargets, TokenStats

BACKENDS: dict[str, Callable] = {
    "reference": reference.linear_loss,
    "chunked": chunked.linear_loss,
    "triton": partial(chunked.linear_loss, kernels=triton_kernels),
}
REDUCTIONS = ("mean", "sum", "none")
HEAD_GRADIENTS = ("exact", "sampled")
_SEEDS = torch.Generator().manual_seed(0)  # of sampled gradients, where no generator is given
SUM_TOLERANCE = 1e-3  # how far a sum of a teacher's rounded probabilities may be from 1


def emo_loss(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...] token ids
    cost_embedding: Tensor | Cost | None,  # [V, D]
    soft_targets: SoftTargets | None = None,  # ids and probs [..., k]
    *,
    mode: str | LossOfStats | Objective = "emo",
    token_weights: Tensor | None = None,  # [...]
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:  # [] or, unreduced, [...] with 0 at ignored positions
    """Computes EMO, or another objective, from logits.

    Like ``F.cross_entropy`` it does not shift the labels, and ignored targets do not count.

    Args:
        cost_embedding: rows of any width, usually the pre-trained output embedding; ``None`` for
            modes without emo. A CostEmbedding is normalised once, a tensor at every call. The cost
            is moved to the device of the logits.
        soft_targets: distributions to learn in place of ``targets``: k token ids and their
            probabilities, such as a teacher's top k. They are constants. ``targets`` then only
            marks the positions that count. Each row has to sum to 1 within 1e-3 and is divided by
            its sum. nll and emo become their expectations. Expected emo is smallest where p is one
            token, NOT where p equals the teacher (see ``SoftTargets``), so mode ``emd`` alone does
            not learn a distribution. Modes that need the probability of one target refuse soft
            targets: tailr, mixce, dft, and any mode with the weighting ``upstream``.
        mode: a name, an ``Objective`` that carries options, or a function of your own. A function
            is tried at every call; ``Objective(function)`` is tried once.
        token_weights: constants that multiply the loss of each token. ``mean`` still divides by
            the number of targets.

    Returns:
        float32 (float64 for float64 logits). Without any target the loss is 0 and its gradients
        are zero, not NaN.

    Raises:
        ValueError: shapes that do not fit, a token outside the vocabulary, soft targets that are
            not probabilities or that the mode refuses, an unknown mode or reduction.
    """
    objective, cost, keep = _checked(
        mode, cost_embedding, logits, targets, reduction, ignore_index, logits.shape[-1]
    )
    assert cost is None or isinstance(cost, CostEmbedding)  # a sharded one was gathered
    kept = logits[keep]
    stats = reference.token_stats(
        kept, _kept_targets(targets, soft_targets, keep, objective, kept, logits.shape[-1]), cost
    )
    loss = objective(*stats)
    if token_weights is not None:
        loss = loss * _kept_weights(token_weights, keep, kept)
    return _reduced(loss.sum() if reduction != "none" else loss, keep, reduction, None)


def linear_emo_loss(
    hidden: Tensor,  # [..., H] hidden states before the output layer
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [...] token ids
    cost_embedding: Tensor | Cost | None,  # [V, D]
    soft_targets: SoftTargets | None = None,  # ids and probs [..., k]
    *,
    mode: str | LossOfStats | Objective = "emo",
    token_weights: Tensor | None = None,  # [...]
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    num_items: Tensor | int | None = None,
    head_gradient: str = "exact",
    head_epsilon: float = EPSILON,
    generator: torch.Generator | None = None,
) -> Tensor:  # [] or, unreduced, [...]
    """Computes ``emo_loss`` from hidden states and the output layer, in less memory.

    Equals ``emo_loss(softcap(logit_scale * (hidden @ weight.T + bias)), targets, cost_embedding)``.
    Ignored tokens are dropped before the output layer. Gradients reach ``hidden``, ``weight`` and
    ``bias``, but never the cost.

    Args:
        soft_targets, token_weights: as in ``emo_loss``.
        softcap: z becomes softcap * tanh(z / softcap), as in Gemma 2.
        backend: ``chunked``, ``triton`` (NVIDIA GPUs), ``reference`` (materialises all logits), or
            ``auto``, the fastest that serves these tensors.
        num_items: what ``mean`` divides by in place of this call's number of targets. With the
            global count of a step, the losses of micro-batches and ranks add up.
        head_gradient: ``exact``, or ``sampled``: unbiased and cheaper gradients from a sample of
            the logits' columns, with exact loss and statistics (``losses/backends/sampling.py``).
            The backend ``reference`` does not sample.
        head_epsilon: the threshold of the sample, in units of one token's loss. A smaller one has
            less variance and keeps more columns.
        generator: draws the seed of the sample, on the CPU. By default a generator of this module
            does, which moves on with each call. The state of ``torch.manual_seed`` is not touched.

    Raises:
        ValueError: as ``emo_loss``, and for a backend that cannot serve.
    """
    check_head_gradient(head_gradient, head_epsilon, backend)
    check_count(num_items)
    return linear_loss_and_stats(
        hidden,
        Head(weight, bias, softcap, logit_scale),
        targets,
        cost_embedding,
        mode,
        soft_targets,
        token_weights=token_weights,
        reduction=reduction,
        ignore_index=ignore_index,
        backend=backend,
        num_items=num_items,
        sampled=_seeded(sampled_as(head_gradient, head_epsilon), generator),
    )[0]


def linear_loss_and_stats(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cost_embedding: Tensor | Cost | None,
    mode: str | LossOfStats | Objective,
    soft_targets: SoftTargets | None = None,
    *,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    backend: str = "auto",
    num_items: Tensor | int | None = None,
    sampled: Sampled | None = None,
) -> tuple[Tensor, TokenStats]:
    """Returns the loss of ``linear_emo_loss`` and the detached statistics of supervised tokens.

    The statistics are in the order of the rows. If a cost is given, log emo is computed whether or
    not the mode reads it.
    """
    vocab_size, width = head.weight.shape
    if hidden.shape[-1] != width:
        raise ValueError(
            f"hidden has width {hidden.shape[-1]} but the weight is {tuple(head.weight.shape)}"
        )
    # a kernel would read past the end of a bias that is too short
    if head.bias is not None and head.bias.shape != (vocab_size,):
        raise ValueError(f"bias has shape {tuple(head.bias.shape)}, wanted {(vocab_size,)}")
    sharded_head = isinstance(head.weight, DTensor)
    objective, cost, keep = _checked(
        mode, cost_embedding, hidden, targets, reduction, ignore_index, vocab_size, sharded_head
    )
    device = hidden.device.type
    kept = hidden[keep]
    if torch.is_autocast_enabled(device):  # the output layer would run in this precision
        kept = kept.to(torch.get_autocast_dtype(device))
    kept_targets = _kept_targets(targets, soft_targets, keep, objective, kept, vocab_size)
    with torch.autocast(device, enabled=False):  # statistics and costs stay in float32
        inner = "none" if reduction == "none" else "sum"
        weights = None if token_weights is None else _kept_weights(token_weights, keep, kept)
        loss, stats = _backend(backend, kept, head.weight, sampled)(
            kept, head, kept_targets, cost, objective, inner, weights
        )
    return _reduced(loss, keep, reduction, num_items), stats


def check_backend(name: str) -> None:
    """Raises ValueError for an unknown backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose from auto, {', '.join(BACKENDS)}")


def check_count(num_items: Tensor | int | None) -> None:
    """Raises ValueError for a count of targets below 1."""
    if num_items is not None and not num_items > 0:
        raise ValueError(f"num_items is {num_items}, wanted the number of targets, 1 or more")


def check_head_gradient(name: str, epsilon: float, backend: str) -> None:
    """Raises ValueError for an unknown head_gradient, or one that the backend cannot serve."""
    if name not in HEAD_GRADIENTS:
        raise ValueError(f"unknown head_gradient {name!r}: choose from {', '.join(HEAD_GRADIENTS)}")
    if not 0 < epsilon < 1:
        raise ValueError(f"head_epsilon is {epsilon}, wanted a number between 0 and 1")
    if backend == "reference" and name == "sampled":
        raise ValueError("backend reference has exact gradients alone: choose chunked")


def sampled_as(name: str, epsilon: float) -> Sampled | None:
    """Returns how a head_gradient samples; None if it is exact."""
    return None if name == "exact" else Sampled(epsilon)


def _seeded(sampled: Sampled | None, generator: torch.Generator | None) -> Sampled | None:
    if sampled is None:
        return None
    seed = torch.randint(2**62, (), generator=_SEEDS if generator is None else generator)
    return sampled._replace(seed=int(seed))


def _backend(name: str, hidden: Tensor, weight: Tensor, sampled: Sampled | None = None) -> Callable:
    check_backend(name)
    reason = triton_kernels.why_not(hidden, weight) if name in ("auto", "triton") else None
    if name == "auto":
        name = "triton" if hidden.is_cuda and reason is None else "chunked"
    elif reason is not None:
        raise ValueError(f"backend triton cannot serve: {reason}; choose chunked")
    if not isinstance(weight, DTensor):
        loss = BACKENDS[name]
        return loss if sampled is None else partial(loss, sampled=sampled)
    if name == "reference":
        raise ValueError("backend reference cannot serve a sharded output layer: choose chunked")
    kernels = triton_kernels if name == "triton" else torch_kernels
    return partial(vocab_parallel.linear_loss, kernels=kernels, sampled=sampled)


def _checked(
    mode: str | LossOfStats | Objective,
    cost_embedding: Tensor | Cost | None,
    rows: Tensor,
    targets: Tensor,
    reduction: str,
    ignore_index: int,
    vocab_size: int,
    sharded_head: bool = False,
) -> tuple[Objective, Cost | None, Tensor]:
    """Returns the objective, the cost on the right device, and the mask of supervised positions."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: choose from {', '.join(REDUCTIONS)}")
    if not rows.is_floating_point():
        raise ValueError(f"logits and hidden states are floating-point numbers, not {rows.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets are integers, not {targets.dtype}")
    if rows.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, wanted {tuple(rows.shape[:-1])}"
        )
    objective, cost = as_objective(mode), as_cost(cost_embedding)
    if cost is None and objective.needs_emo:
        raise ValueError(f"mode {objective.name} needs a cost embedding")
    if cost is not None:
        cost.to(rows.device).check(vocab_size)
    if isinstance(cost, ShardedCost) and not sharded_head:
        cost = cost.gather()
    keep = targets != ignore_index
    outside = keep & ((targets < 0) | (targets >= vocab_size))
    if outside.any():
        raise ValueError(
            f"target {targets[outside][0].item()} is outside the vocabulary of {vocab_size} tokens"
        )
    return objective, cost, keep


def _kept_targets(
    targets: Tensor,
    soft: SoftTargets | None,
    keep: Tensor,
    objective: Objective,
    kept: Tensor,
    vocab_size: int,
) -> Tensor | SoftTargets:
    """Checks the targets of the supervised tokens and returns them.

    They are token ids [N], or soft targets with probabilities in the dtype of the statistics.
    """
    if soft is None:
        return targets[keep].long()
    if objective.needs_p:
        what = (
            f"mode {objective.name}"
            if objective.emo_weighting == "paper"
            else "emo_weighting=upstream"
        )
        raise ValueError(
            f"{what} needs the probability of one target: "
            "soft targets work with mle, emo, emo2, emd and mix, and emo_weighting=paper"
        )
    ids, probs = soft
    if ids.shape != probs.shape or ids.shape[:-1] != targets.shape or not ids.shape[-1]:
        raise ValueError(
            f"soft targets are {tuple(ids.shape)} ids, {tuple(probs.shape)} probs, "
            f"wanted {(*targets.shape, 'k')}"
        )
    if ids.is_floating_point() or not probs.is_floating_point():
        raise ValueError(
            f"soft targets are {ids.dtype} ids and {probs.dtype} probs, "
            "wanted integer ids and floating probs"
        )
    ids, probs = (
        ids[keep].long(),
        probs.detach()[keep].to(torch.promote_types(kept.dtype, torch.float32)),
    )
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValueError(
            f"soft target {ids[outside][0].item()} is outside the vocabulary of {vocab_size} tokens"
        )
    if not ((probs >= 0) & torch.isfinite(probs)).all():
        raise ValueError("soft targets have probabilities that are negative or not finite")
    total = probs.sum(-1, keepdim=True)
    wrong = (total - 1).abs() > SUM_TOLERANCE
    if wrong.any():
        raise ValueError(
            f"soft targets sum to {total[wrong][0].item():.4g}, wanted 1: "
            "divide the top k by their sum"
        )
    return SoftTargets(ids, probs / total)


def _kept_weights(
    weights: Tensor, keep: Tensor, kept: Tensor
) -> Tensor:  # [N] in the dtype of the statistics
    if weights.shape != keep.shape:
        raise ValueError(
            f"token_weights have shape {tuple(weights.shape)}, wanted {tuple(keep.shape)}"
        )
    return weights.detach()[keep].to(torch.promote_types(kept.dtype, torch.float32))


def _reduced(loss: Tensor, keep: Tensor, reduction: str, num_items: Tensor | int | None) -> Tensor:
    if reduction == "none":
        return loss.new_zeros(keep.shape).masked_scatter(keep, loss)
    if reduction == "sum":
        return loss
    count = keep.sum() if num_items is None else torch.as_tensor(num_items)
    return loss / count.clamp_min(1)
