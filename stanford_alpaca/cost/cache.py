"""Cost rows that stay from step to step: with a frozen cost, a target always has the same row."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_lock = threading.Lock()  # of all caches: threads may share one


class CostRows(NamedTuple):
    """The costs of n targets: those of the k-th are ``table[which[k]]``.

    The target itself is an exception: its cost is 0, whatever the table holds there.
    """

    table: Tensor  # [r, V] costs, not negative, of any floating dtype
    which: Tensor  # [n] rows of the table


class CostCache:
    """bfloat16 rows of the targets seen so far, as many as the budget holds.

    Storing c (not the cosine) in bfloat16 changes each cost by at most 1/256 of itself. emo is a
    mean of costs, so the same holds for it. Rows that find no room are rounded as well, so a result
    does not depend on earlier batches. Only the last digit of a cost can differ, because a float32
    product over other rows can round differently.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        mib: float,
        # [V] how often each token is a target; only the most frequent ones are kept
        counts: Tensor | None = None,
    ):
        rows = min(vocab_size, int(mib * 2**20) // (2 * vocab_size))
        self.table = torch.empty(rows, vocab_size, dtype=torch.bfloat16, device=device)
        # [V] the row of each token in the table, or -1
        self._slots = torch.full((vocab_size,), -1, device=device)
        self._used = 0
        self._wanted = torch.ones(vocab_size, dtype=torch.bool, device=device)
        if counts is not None and rows < vocab_size:
            self._wanted.zero_()[counts.to(device).argsort(descending=True)[:rows]] = True

    def rows(self, targets: Tensor, compute: Callable[[Tensor], Tensor]) -> CostRows:
        """Returns the rows of the targets [n].

        ``compute`` has to return those of r tokens, [r, V] in float32.
        """
        with _lock:
            return self._rows(targets, compute)

    def _rows(self, targets: Tensor, compute: Callable[[Tensor], Tensor]) -> CostRows:
        tokens, index = targets.unique(return_inverse=True)
        new = tokens[(self._slots[tokens] < 0) & self._wanted[tokens]][
            : len(self.table) - self._used
        ]
        if len(new):
            self._slots[new] = torch.arange(self._used, self._used + len(new), device=new.device)
            self.table[self._used : self._used + len(new)] = compute(new)
            self._used += len(new)
        slots = self._slots[tokens]
        outside = slots < 0
        if not outside.any():
            return CostRows(self.table, slots[index])
        table = self.table.new_empty(len(tokens), self.table.shape[1])
        table[~outside] = self.table[slots[~outside]]
        table[outside] = compute(tokens[outside]).to(table.dtype)
        return CostRows(table, index)
