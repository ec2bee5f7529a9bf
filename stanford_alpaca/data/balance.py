"""Balancing: within each optimizer step, examples go to ranks and micro-batches so that all have about as much to do."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def even_groups(costs: np.ndarray, size: int) -> np.ndarray:  # [len(costs) / size, size]
    """Groups of ``size`` indices with near equal sums: the dearest first, each to the group that has least and is not full."""
    count = len(costs) // size
    groups: list[list[int]] = [[] for _ in range(count)]
    sums = np.zeros(count)
    for index in np.argsort(-costs, kind="stable").tolist():
        group = int(sums.argmin())
        groups[group].append(index)
        sums[group] = np.inf if len(groups[group]) == size else sums[group] + costs[index]
    return np.array(groups)


def balanced_order(
    lengths: np.ndarray,  # [G] tokens of one step's examples
    batch: int,
    ranks: int,
    padded: bool,
) -> np.ndarray:  # [G]: micro-batches of the ranks in turn, as accelerate deals them out
    """An order of a step's examples in which ranks have about the same to do, and micro-batches at the same time too.

    Where a micro-batch is padded to its longest, examples of similar lengths go together; else tokens are what costs, and
    micro-batches get equal sums. Then micro-batches go to ranks, those of each rank the dearest first.
    """
    if padded:
        groups = np.argsort(-lengths, kind="stable").reshape(-1, batch)
        costs = lengths[groups].max(1)
    else:
        groups = even_groups(lengths, batch)
        costs = lengths[groups].sum(1)
    return groups[even_groups(costs, len(groups) // ranks).T].reshape(-1)


class BalancedSampler(Sampler):
    """The indices of another sampler, balanced within each optimizer step: a step's examples stay the same.

    Args:
        sampler: gives whole global batches; what it draws, and when, is not changed.
        lengths: [N] tokens of the data set's items.
        batch, ranks, accumulation: micro-batches of ``batch``, ``ranks * accumulation`` of them to a step.
        padded: whether micro-batches are padded, see ``balanced_order``.
    """

    def __init__(
        self,
        sampler: Sampler,
        lengths: np.ndarray,
        batch: int,
        ranks: int,
        accumulation: int,
        padded: bool,
    ):
        self.sampler, self.lengths = sampler, lengths
        self.batch, self.ranks, self.accumulation, self.padded = batch, ranks, accumulation, padded

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        steps = np.array(list(self.sampler)).reshape(
            -1, self.batch * self.ranks * self.accumulation
        )
        for step in steps:
            yield from step[
                balanced_order(self.lengths[step], self.batch, self.ranks, self.padded)
            ].tolist()

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
