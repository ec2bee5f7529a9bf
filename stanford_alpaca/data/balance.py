"""Balances each optimizer step: assigns its examples evenly to ranks and micro-batches."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def even_groups(costs: np.ndarray, size: int) -> np.ndarray:  # [len(costs) / size, size]
    """Groups indices, ``size`` to a group, so that the sums of the groups' costs are nearly equal.

    Takes the indices in descending order of cost. Each joins the group with the smallest sum that
    is not full.
    """
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
) -> np.ndarray:  # [G] indices; accelerate gives micro-batch k to rank k % ranks
    """Orders one step's examples so that all ranks have about equal work.

    Micro-batches that run at the same time have about equal costs too. If micro-batches are
    padded, examples of similar lengths go together, because each is padded to its longest.
    Otherwise only tokens cost, so micro-batches get nearly equal numbers of tokens. Each rank
    processes its micro-batches in descending order of cost.
    """
    if padded:
        groups = np.argsort(-lengths, kind="stable").reshape(-1, batch)
        costs = lengths[groups].max(1)
    else:
        groups = even_groups(lengths, batch)
        costs = lengths[groups].sum(1)
    return groups[even_groups(costs, len(groups) // ranks).T].reshape(-1)


class BalancedSampler(Sampler):
    """Reorders the indices of another sampler to balance each optimizer step.

    The set of examples in a step stays the same.

    Args:
        sampler: yields whole global batches; what it draws, and when, does not change.
        lengths: [N] number of tokens of each item of the data set.
        batch, ranks, accumulation: a step has ``ranks * accumulation`` micro-batches of ``batch``
            examples.
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
