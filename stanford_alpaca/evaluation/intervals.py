"""How certain a measure is: 95 % intervals, and paired differences between models.

Both are computed over test items or over seeds.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.stats import binomtest

RESAMPLES = 2000
PAIRED_RESAMPLES = 10_000  # cheap, because ``paired_bootstrap`` draws few distinct values
FEWEST = 10  # items that an interval needs
AT_ONCE = 250  # resamples at a time, whose [AT_ONCE, n] counts are held as float64


class Measured(NamedTuple):
    """A value with its 95 % interval. Both ends are NaN if there is no interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference of a measure between two models."""

    mean: float
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided


class Items(NamedTuple):
    """A measure computed from sums over test items: a mean, a perplexity, a calibration error.

    Items with nothing to measure are rows of zeros and do not count. With fewer than FEWEST other
    items there is no interval and no p: a bootstrap of so few finds differences where there are
    none.
    """

    sums: np.ndarray  # [n, k] float64, a row per test item (over its seeds)
    of: Callable[[np.ndarray], np.ndarray]  # [..., k] -> [...]
    # resampling shifts the value, so the resamples give intervals of differences only
    biased: bool = False

    @property
    def value(self) -> float:
        return float(self.of(self.sums.sum(0)))

    def measured(self, seed: int = 0) -> Measured:
        """Returns the value, with the percentile interval of a bootstrap over items."""
        sums = self.sums[self.sums.any(1)]
        if self.biased or len(sums) < FEWEST:
            return Measured(self.value, np.nan, np.nan)
        low, high = np.quantile(self.of(_resampled(sums, seed)), [0.025, 0.975])
        return Measured(self.value, float(low), float(high))

    def minus(self, other: "Items", seed: int = 0) -> Difference:
        """Returns self minus other on the same items. Both see the same resamples."""
        if len(self.sums) != len(other.sums):
            raise ValueError(f"{len(self.sums)} and {len(other.sums)} test items cannot be paired")
        kept = self.sums.any(1) | other.sums.any(1)
        if kept.sum() < FEWEST:
            return Difference(self.value - other.value, np.nan, np.nan, np.nan)
        gains = self.of(_resampled(self.sums[kept], seed)) - other.of(
            _resampled(other.sums[kept], seed)
        )
        return of_resamples(self.value - other.value, gains)


class Replicates(NamedTuple):
    """A measure of a whole set of responses, such as MAUVE, with a value per seed.

    Intervals are Student's t over the seeds.
    """

    values: np.ndarray  # [seeds] float64

    def measured(self) -> Measured:
        """Returns the mean over seeds. With one seed there is no interval."""
        return Measured(*_student(self.values)[:3])

    def minus(self, other: "Replicates") -> Difference:
        """Returns self minus other, paired by seed.

        With one seed there is no interval, and p is NaN.
        """
        return Difference(*_student(self.values - other.values))


def mean_of(values: np.ndarray, weights: np.ndarray | None = None) -> Items:  # [n], [n]
    """Returns the measure sum(values) / sum(weights).

    With weights, ``values`` are sums within items. Without, they are the items' own values.
    """
    weights = np.ones(len(values)) if weights is None else weights
    return Items(np.stack([values, weights], 1).astype(np.float64), _ratio)


def paired_bootstrap(gains: list[np.ndarray], seed: int = 0) -> Difference:
    """Returns the mean over tasks of the mean gain, with its percentile interval and p-value.

    Args:
        gains: for each task an array [n] of how much more is right on each test item, between -1
            and 1 (a mean over seeds). Items are drawn with replacement within each task.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(PAIRED_RESAMPLES)
    for gain in gains:
        # the values are few: drawing how often each occurs is the same as drawing items
        values, counts = np.unique(gain, return_counts=True)
        total += (
            random.multinomial(len(gain), counts / len(gain), PAIRED_RESAMPLES) @ values / len(gain)
        )
    return of_resamples(float(np.mean([gain.mean() for gain in gains])), total / len(gains))


def of_resamples(mean: float, resampled: np.ndarray) -> Difference:
    """Returns a difference with the percentile interval and the p-value that its resamples give.

    p is twice the share of resamples at or beyond zero, on the rarer side. The sample itself counts
    as one of them.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    rarer = min((resampled <= 1e-12).sum(), (resampled >= -1e-12).sum())
    return Difference(
        mean, float(low), float(high), float(min(1.0, 2 * (rarer + 1) / (len(resampled) + 1)))
    )


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """Returns the two-sided exact p of McNemar's test on two arrays [n] of right and wrong answers.

    Only the answers that exactly one side got right count. p is the probability that they split at
    least this unevenly if each side is equally likely to be right.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], np.finfo(np.float64).tiny)


def _resampled(sums: np.ndarray, seed: int) -> np.ndarray:  # [n, k] -> [RESAMPLES, k]
    """Returns sums over items drawn with replacement.

    Equal seeds and equal numbers of items draw the same items.
    """
    counts = _counts(len(sums), seed)
    return np.concatenate(
        [counts[start : start + AT_ONCE] @ sums for start in range(0, RESAMPLES, AT_ONCE)]
    )


# drawing takes longer than adding up, and all measures of an evaluation share the draw
@lru_cache(maxsize=1)
def _counts(n: int, seed: int) -> np.ndarray:  # [RESAMPLES, n] uint8
    # how often each item is drawn, which is never above 255 in practice
    random = np.random.default_rng(seed)
    return np.concatenate(
        [
            random.multinomial(n, np.full(n, 1 / n), AT_ONCE).astype(np.uint8)
            for _ in range(0, RESAMPLES, AT_ONCE)
        ]
    )


def _student(values: np.ndarray) -> tuple[float, float, float, float]:
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, np.nan, np.nan, np.nan
    error = float(values.std(ddof=1)) / np.sqrt(n)
    if error == 0:  # equal values do not show how they would vary
        return mean, np.nan, np.nan, np.nan
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1))
