"""Sums over supervised tokens, for the log and for evaluation."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.losses.types import TokenStats

_lock = threading.Lock()  # of all meters: threads may share one


class Sums(NamedTuple):
    """Sums over supervised tokens."""

    tokens: float
    loss: float
    nll: float
    emo: float  # 0 where it was not computed
    target_prob: float


class Meter:
    """Running sums over supervised tokens, in float64, on the device until they are drained."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._marked: Tensor | None = None

    def add(self, stats: TokenStats, objective: Objective, weights: Tensor | None = None) -> None:
        """Adds tokens. ``weights`` multiply their losses, and nothing else."""
        nll = stats.nll.double()
        emo = torch.zeros_like(nll) if stats.log_emo is None else stats.log_emo.double().exp()
        loss = objective(stats.nll, stats.log_emo).double()
        loss = loss if weights is None else loss * weights
        new = torch.stack([torch.ones_like(nll), loss, nll, emo, torch.exp(-nll)]).sum(1)
        with _lock:
            self._sums = new if self._sums is None else self._sums + new

    def mark(self) -> None:
        """Remembers the sums so far."""
        self._marked = self._sums

    def back(self) -> None:
        """Forgets what was added since the mark."""
        self._sums = self._marked

    def drain(self, device: torch.device | str, over_ranks: bool = False) -> Sums:
        """Returns the sums so far and starts again from zero.

        ``over_ranks`` takes one all-reduce of 5 float64 numbers on the device.
        """
        with _lock:
            found, self._sums = self._sums, None
        if found is None:
            sums = torch.zeros(5, dtype=torch.float64, device=device)
        else:
            sums = found.to(device)
        if over_ranks:
            torch.distributed.all_reduce(sums)
        return Sums(*sums.tolist())
