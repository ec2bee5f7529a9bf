"""Whether two checkpoints differ: a paired bootstrap over test items, and McNemar's exact test."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 10_000


class Difference(NamedTuple):
    """How much more one checkpoint gets right than another."""

    mean: float
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided


def paired_bootstrap(gains: list[np.ndarray], seed: int = 0) -> Difference:
    """The mean over tasks of the mean gain, its percentile interval and p-value.

    Args:
        gains: for each task, per test item [n], how much more is right (between -1 and 1, a mean over seeds). Items are drawn
            with replacement within each task.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for gain in gains:
        values, counts = np.unique(gain, return_counts=True)  # few: drawing how often each comes is drawing items
        total += random.multinomial(len(gain), counts / len(gain), RESAMPLES) @ values / len(gain)
    return of_resamples(float(np.mean([gain.mean() for gain in gains])), total / len(gains))


def of_resamples(mean: float, resampled: np.ndarray) -> Difference:
    """The percentile interval and the p-value of a difference from what it is in resamples.

    p is twice the share of resamples at or beyond no difference, on the rarer side, the sample itself counted in.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    rarer = min((resampled <= 1e-12).sum(), (resampled >= -1e-12).sum())
    return Difference(mean, float(low), float(high), float(min(1.0, 2 * (rarer + 1) / (len(resampled) + 1))))


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """Two-sided exact p of [n] right and wrong answers: whether those that differ differ as coins fall."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
