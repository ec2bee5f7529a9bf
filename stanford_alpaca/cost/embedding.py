"""The transport cost between tokens, read from an embedding: c_i = 1 - cos(e_i, e_y)  (EMO paper, section 3.2)."""

from pathlib import Path

import torch
from torch import Tensor

COST_KINDS = ("cosine", "identity")
ZERO_BELOW = 1e-6  # in float32, 1 - cos of two equal rows is noise of about this size


class CostEmbedding:
    """The frozen embedding that prices moving probability from token i to the target y.

    Args:
        embedding: [V, D] rows of any floating dtype; ``None`` for ``identity``. It is copied, normalised and detached.
        kind: ``cosine``: c_i = 1 - cos(e_i, e_y), between 0 and 2; ``identity``: c_i = 1 for every i but y (the ablation
            under which emo is 1 - p_y).

    It is no ``nn.Module`` on purpose: it is never trained, never decayed, never saved into a checkpoint and not broadcast
    by DDP. Rows of zeros (padded vocabularies) have cosine 0 with every other token. Costs are float32 with an absolute
    error of about 1e-7, so c below 0.01 has a relative error above 1e-5; float64 embeddings stay float64.
    """

    def __init__(self, embedding: Tensor | None, kind: str = "cosine"):
        if kind not in COST_KINDS:
            raise ValueError(f"unknown cost kind {kind!r}: choose from {', '.join(COST_KINDS)}")
        if kind == "cosine" and (embedding is None or embedding.dim() != 2):
            got = "none" if embedding is None else f"shape {tuple(embedding.shape)}"
            raise ValueError(f"a cosine cost needs an embedding [vocabulary, width], got {got}")
        self.kind = kind
        self.rows: Tensor | None = None  # [V, D] unit rows, float32 (float64 if the embedding is)
        if kind == "cosine":
            assert embedding is not None
            exact = embedding.detach().to(_at_least_float32(embedding.dtype))
            # norms in float64: squares of small entries do not underflow, and 1 - cos of equal rows stays below ZERO_BELOW
            norms = torch.linalg.vector_norm(exact, dim=1, keepdim=True, dtype=torch.float64).to(exact.dtype)
            self.rows = torch.where(norms > torch.finfo(exact.dtype).tiny, exact / norms, 0.0)

    @classmethod
    def from_file(cls, path: str | Path, kind: str = "cosine") -> "CostEmbedding":
        """Reads a safetensors file that holds one [V, D] tensor."""
        from safetensors.torch import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"{path}: wanted one tensor [vocabulary, width], found {', '.join(sorted(tensors)) or 'none'}")
        return cls(next(iter(tensors.values())), kind)

    def to(self, device: torch.device | str) -> "CostEmbedding":
        """Moves the rows to the device, in place."""
        if self.rows is not None:
            self.rows = self.rows.to(device)
        return self

    def check(self, vocab_size: int) -> None:
        """Raises ValueError unless there is one row for every logit."""
        if self.rows is not None and self.rows.shape[0] != vocab_size:
            raise ValueError(
                f"the cost embedding has {self.rows.shape[0]} rows but there are {vocab_size} logits: "
                "build the cost after resizing the vocabulary"
            )

    def costs(
        self,
        targets: Tensor,  # [n] token ids
        vocab_size: int,
    ) -> Tensor:  # [n, V] costs in [0, 2], a new tensor the caller may overwrite
        """The costs of moving to each target: 0 exactly at the target and at duplicates of it, never negative."""
        if self.rows is None:
            costs = torch.ones(targets.shape[0], vocab_size, device=targets.device)
        else:
            with torch.autocast(self.rows.device.type, enabled=False):
                costs = self.rows[targets] @ self.rows.T
            costs.neg_().add_(1)
            torch.threshold_(costs, ZERO_BELOW, 0.0)
        return costs.scatter_(1, targets[:, None], 0.0)


def as_cost(cost: "Tensor | CostEmbedding | None") -> CostEmbedding | None:
    """Accepts what the public functions accept: a [V, D] tensor, a CostEmbedding, or nothing."""
    return CostEmbedding(cost) if isinstance(cost, Tensor) else cost


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
