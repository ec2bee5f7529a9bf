"""The transport cost between tokens, read from an embedding.

It is c_i = 1 - cos(e_i, e_y)  (EMO paper, section 3.2).
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from stanford_alpaca.cost.cache import CostCache, CostRows

COST_KINDS = ("cosine", "identity", "shuffled", "centred")
TILE = 2**13  # rows that are held in a higher precision at a time
ZERO_BELOW = 1e-6  # in float32, 1 - cos of two equal rows is noise of about this size
_precision_lock = threading.Lock()
# device -> how many blocks of ``full_precision`` run, and the precision before the first of them
_in_full_precision: dict[str, tuple[int, str]] = {}


class CostEmbedding:
    """The frozen embedding that gives the cost of moving probability from token i to the target y.

    Args:
        embedding: [V, D] rows of any floating dtype; ``None`` for ``identity``. It is copied,
            normalised and detached.
        kind: ``cosine``: c_i = 1 - cos(e_i, e_y), between 0 and 2. ``identity``: c_i = 1 for every
            i but y, an ablation under which emo is 1 - p_y. ``shuffled``: the cosine cost with the
            rows permuted among the tokens, a control with the same costs and no meaning.
            ``centred``: the cosine cost of e - mean(e), because the mean row holds much of a
            token's frequency (Mu and Viswanath, ICLR 2018). Both leave rows of zeros out.
        seed: of the permutation.
        check_finite: raises ValueError for rows with NaN or Inf. A live output layer is not
            checked, because a run's guard names what is wrong with it, on all ranks.

    It is deliberately no ``nn.Module``: it is never trained, never decayed, never saved into a
    checkpoint and not broadcast by DDP. Rows of zeros (padded vocabularies) have cosine 0 with
    every other token. Costs are float32 with an absolute error of about 1e-7, so c below 0.01 has a
    relative error above 1e-5. Costs of float64 embeddings stay float64. Costs below ZERO_BELOW
    become 0, in float64 as well: an absolute error of at most 1e-6.
    """

    def __init__(
        self,
        embedding: Tensor | None,
        kind: str = "cosine",
        seed: int = 0,
        *,
        check_finite: bool = True,
    ):
        if kind not in COST_KINDS:
            raise ValueError(f"unknown cost kind {kind!r}: choose from {', '.join(COST_KINDS)}")
        if kind != "identity" and (embedding is None or embedding.dim() != 2):
            got = "none" if embedding is None else f"shape {tuple(embedding.shape)}"
            raise ValueError(f"a {kind} cost needs an embedding [vocabulary, width], got {got}")
        self.kind = kind
        self.rows: Tensor | None = None  # [V, D] unit rows, float32 (float64 if the embedding is)
        self.directed: Tensor | None = None  # [V] which rows are not zeros
        self._cached: dict | None = None  # the arguments of the cache, made at the first use
        self._cache: CostCache | None = None
        if kind != "identity":
            assert embedding is not None
            if check_finite and not embedding.is_meta:
                _check_finite(embedding.detach())
            embedding = _arranged(embedding.detach(), kind, seed)
            exact, norms = (
                embedding.to(_at_least_float32(embedding.dtype)),
                norms_of(embedding)[:, None],
            )
            directed = norms > torch.finfo(exact.dtype).tiny
            self.rows, self.directed = (
                (exact / norms).masked_fill_(~directed, 0.0),
                directed.squeeze(1),
            )

    @classmethod
    def of_rows(cls, rows: Tensor) -> "CostEmbedding":
        """Makes a cost from [V, D] rows that already have unit length or are zeros.

        The rows are not copied.
        """
        self = cls(None, "identity")
        self.kind, self.rows, self.directed = "cosine", rows, rows.any(1)
        return self

    @classmethod
    def from_file(cls, path: str | Path, kind: str = "cosine", seed: int = 0) -> "CostEmbedding":
        """Reads a safetensors file that holds one [V, D] tensor."""
        from safetensors.torch import load_file

        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path}: a folder, a pipe or a device; wanted a file")
        tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(
                f"{path}: wanted one tensor [vocabulary, width], "
                f"found {', '.join(sorted(tensors)) or 'none'}"
            )
        (rows,) = tensors.values()
        if not rows.is_floating_point() or rows.numel() == 0:
            raise ValueError(f"{path}: wanted floating-point numbers")
        try:
            return cls(rows, kind, seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to(self, device: torch.device | str) -> "CostEmbedding":
        """Moves the rows to the device, in place."""
        if self.rows is not None and self.directed is not None:
            before, self.rows, self.directed = (
                self.rows,
                self.rows.to(device),
                self.directed.to(device),
            )
            self._cache = self._cache if self.rows is before else None
        return self

    def cache(self, mib: float, counts: Tensor | None = None) -> "CostEmbedding":
        """Keeps cost rows in bfloat16 from call to call, in at most ``mib`` MiB.

        They are on the device of the embedding. Each cost, and so emo, then has a relative error of
        at most 1/256. A row is computed when its target first occurs. All rows are kept if they fit
        (2 V^2 bytes). If not, those of the most frequent targets by ``counts`` [V] are kept, or
        without counts those that occur first. Soft targets have expected costs of their own and do
        not use the cache.

        Raises:
            ValueError: an impossible budget, or counts of another shape.
        """
        if not 0 <= mib < math.inf:
            raise ValueError(f"the budget of kept cost rows is {mib} MiB: give 0 (none) or more")
        if self.rows is not None and 0 < mib * 2**20 < 2 * len(self.rows):
            raise ValueError(
                f"{mib} MiB hold no row of {len(self.rows)} bfloat16 costs: give more, or 0 (none)"
            )
        if counts is not None and self.rows is not None and counts.shape != self.rows.shape[:1]:
            raise ValueError(
                f"counts have shape {tuple(counts.shape)}, wanted {tuple(self.rows.shape[:1])}"
            )
        self._cached, self._cache = {"mib": mib, "counts": counts} if mib > 0 else None, None
        return self

    def check(self, vocab_size: int) -> None:
        """Raises ValueError unless there is one row for every logit."""
        if self.rows is not None and self.rows.shape[0] != vocab_size:
            raise ValueError(
                f"the cost embedding has {self.rows.shape[0]} rows but there are "
                f"{vocab_size} logits: build the cost after resizing the vocabulary"
            )

    def unique_rows(self, targets: Tensor) -> CostRows | None:  # [n]
        """Returns the costs of the targets, computed once for equal targets.

        Returns None for identity, where every other token costs 1.
        """
        if self.rows is None:
            return None
        if self._cached is not None:
            # tensors made in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                self._cache = self._cache or CostCache(
                    len(self.rows), self.rows.device, **self._cached
                )
                return self._cache.rows(targets, self._compute)
        tokens, index = targets.unique(return_inverse=True)
        return CostRows(self._compute(tokens), index)

    def costs(
        self,
        targets: Tensor,  # [n] token ids
        vocab_size: int,
        # [n, k] ids and probabilities that tau gives to tokens other than the target
        rest: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # [n, V] costs in [0, 2], a new tensor the caller may overwrite
        """Returns the costs of moving to each target.

        They are never negative, and exactly 0 at the target and at duplicates of it. With ``rest``
        (see ``split_targets``) they are the expected costs sum_j tau_j c_ij. There tau is ``probs``
        at the ids, where equal ids add up, and 1 - sum of ``probs`` at the target.
        """
        if rest is not None:
            return self._expected_costs(targets, *rest, vocab_size)
        rows = self.unique_rows(targets)
        if rows is None or self.rows is None:
            costs = torch.ones(targets.shape[0], vocab_size, device=targets.device)
        else:
            costs = rows.table[rows.which].to(_at_least_float32(self.rows.dtype))
        return costs.scatter_(1, targets[:, None], 0.0)

    def _compute(self, tokens: Tensor) -> Tensor:  # [r] -> [r, V] in the dtype of the rows
        assert self.rows is not None
        return transport_costs(self.rows[tokens], self.rows)

    def _expected_costs(
        self, targets: Tensor, ids: Tensor, probs: Tensor, vocab_size: int
    ) -> Tensor:
        """Computes expected costs as one product: 1 - u_i . sum_j tau_j u_j.

        At the target this would cancel if the teacher is nearly sure, so there the sum over the
        rest alone is taken. A cost below ZERO_BELOW is 0; at the target that limit is multiplied by
        the probability of the rest. The absolute error is at most about 1e-6, multiplied likewise.
        """
        if self.rows is None or self.directed is None:
            away = probs.sum(1, keepdim=True)
            costs = probs.new_ones(targets.shape[0], vocab_size)
            at_target, undirected = away, probs
        else:
            probs = probs.to(self.rows.dtype)
            away, towards = probs.sum(1, keepdim=True), self.rows[targets]
            with full_precision(self.rows.device.type):
                # [n, D], without a tensor [n, k, D]
                moved = embedding_bag(ids, self.rows, per_sample_weights=probs, mode="sum")
                costs = torch.addcmul(moved, 1 - away, towards) @ self.rows.T
            costs.neg_().add_(1)
            at_target = away - (moved * towards).sum(1, keepdim=True)
            undirected = torch.where(self.directed[ids], 0.0, probs)
        # a row of zeros has cosine 0 with itself too, but moving to itself costs nothing
        costs.scatter_add_(1, ids, -undirected)
        torch.threshold_(costs, ZERO_BELOW, 0.0)
        return costs.scatter_(
            1, targets[:, None], torch.where(at_target >= ZERO_BELOW * away, at_target, 0.0)
        )


def is_embedding_file(name: str) -> bool:
    """Whether a name stands for a file of ``CostEmbedding.from_file``, and not for a model."""
    return Path(name).is_file() or Path(name).suffix == ".safetensors"


def _check_finite(rows: Tensor) -> None:
    """Raises ValueError for a row with NaN or Inf, or one whose norm overflows."""
    wrong = ~norms_of(rows).isfinite()
    if wrong.any():
        raise ValueError(
            f"row {int(wrong.nonzero()[0])} of the cost embedding is not finite; wanted numbers"
        )


def _arranged(rows: Tensor, kind: str, seed: int) -> Tensor:  # [V, D] -> [V, D]
    """Permutes the rows for ``shuffled``, and takes their mean off for ``centred``.

    Rows of zeros stay where they are. Rows on the meta device are returned as they are.
    """
    if kind == "cosine" or rows.is_meta:
        return rows
    tokens = rows.any(1).nonzero().squeeze(1)
    kept = rows[tokens]
    if kind == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        kept = kept[torch.randperm(len(kept), generator=generator).to(rows.device)]
    else:
        exact = kept.to(_at_least_float32(rows.dtype))
        kept = exact - exact.mean(0, dtype=torch.float64).to(exact.dtype)
        # rows of tokens that were added are the mean row: what is left of them is rounding
        least = max(1e-5, 4 * torch.finfo(rows.dtype).eps) * norms_of(exact)
        kept = kept.masked_fill((norms_of(kept) < least)[:, None], 0.0)
    return rows.to(kept.dtype, copy=True).index_copy_(0, tokens, kept)


def transport_costs(towards: Tensor, rows: Tensor) -> Tensor:  # [r, D], [V, D] -> [r, V]
    """Returns 1 - cos of unit rows (cos is 0 for rows of zeros), with noise set to 0."""
    with full_precision(rows.device.type):
        costs = torch.addmm(rows.new_ones(1), towards, rows.T, alpha=-1)
    return cut_noise(costs)


def cut_noise(costs: Tensor) -> Tensor:
    """Sets costs that are noise to 0, in place, and returns them."""
    return torch.threshold_(costs, ZERO_BELOW, 0.0)


def norms_of(rows: Tensor) -> Tensor:  # [V, D] -> [V] float32 (float64 of float64 rows)
    """Returns the norm of each row, summed in float64.

    Squares of small entries then do not underflow, and 1 - cos of equal rows stays below
    ZERO_BELOW.
    """
    norms = [
        torch.linalg.vector_norm(tile, dim=1, dtype=torch.float64) for tile in rows.split(TILE)
    ]
    return torch.cat(norms).to(_at_least_float32(rows.dtype))


def inverse_norms(rows: Tensor) -> Tensor:  # [V, D] -> [V] float32 (float64 of float64 rows)
    """Returns 1 / norm of each row, and 0 for rows of zeros."""
    norms = norms_of(rows)
    return torch.where(norms > torch.finfo(norms.dtype).tiny, 1 / norms, 0.0)


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Computes matrix products in the precision of their operands while the block runs.

    This holds under autocast too, and where --tf32 asks for less. The setting is the process's: of
    several threads the last one restores it.
    """
    backends: Any = torch.backends
    products = (backends.cuda if device == "cuda" else backends.mkldnn).matmul
    with torch.autocast(device, enabled=False):
        with _precision_lock:
            inside, asked = _in_full_precision.get(device, (0, products.fp32_precision))
            _in_full_precision[device] = (inside + 1, asked)
            products.fp32_precision = "ieee"
        try:
            yield
        finally:
            with _precision_lock:
                inside, asked = _in_full_precision.pop(device)
                if inside > 1:
                    _in_full_precision[device] = (inside - 1, asked)
                else:
                    products.fp32_precision = asked


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
