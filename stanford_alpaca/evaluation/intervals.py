"""How sure a measure is: intervals of 95 %, and paired differences between models, over test items or over seeds."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.stats import binomtest

RESAMPLES = 2000
PAIRED_RESAMPLES = 10_000  # of test items, which few numbers describe
FEWEST = 10  # items that an interval is made of
AT_ONCE = 250  # resamples whose [AT_ONCE, n] counts are held as float64 at a time


class Measured(NamedTuple):
    """A value with its 95 % interval; NaN for both ends where there is none."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much more one checkpoint gets right than another."""

    mean: float
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided


class Items(NamedTuple):
    """A measure that is a function of sums over test items: a mean, a perplexity, a calibration error.

    Items without anything to measure are rows of zeros, and do not count. Of fewer than FEWEST others there is no interval and
    no p: a bootstrap of so few finds differences where there are none.
    """

    sums: np.ndarray  # [n, k] float64, a row per test item (over its seeds)
    of: Callable[[np.ndarray], np.ndarray]  # [..., k] -> [...]
    biased: bool = (
        False  # resampling shifts it, so that the resamples tell of differences, not of the value
    )

    @property
    def value(self) -> float:
        return float(self.of(self.sums.sum(0)))

    def measured(self, seed: int = 0) -> Measured:
        """The value, and the percentile interval of a bootstrap over items."""
        sums = self.sums[self.sums.any(1)]
        if self.biased or len(sums) < FEWEST:
            return Measured(self.value, np.nan, np.nan)
        low, high = np.quantile(self.of(_resampled(sums, seed)), [0.025, 0.975])
        return Measured(self.value, float(low), float(high))

    def minus(self, other: "Items", seed: int = 0) -> Difference:
        """Self minus other, on the same items: both see the same resamples."""
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
    """A measure of a whole set of responses, such as MAUVE: a value per seed. Intervals are Student's t over the seeds."""

    values: np.ndarray  # [seeds] float64

    def measured(self) -> Measured:
        """The mean over seeds; with one seed there is no interval."""
        return Measured(*_student(self.values)[:3])

    def minus(self, other: "Replicates") -> Difference:
        """Self minus other, paired by seed; with one seed there is no interval, and p is NaN."""
        return Difference(*_student(self.values - other.values))


def mean_of(values: np.ndarray, weights: np.ndarray | None = None) -> Items:  # [n], [n]
    """sum(values) / sum(weights): ``values`` are sums within items where there are weights, else the items' own values."""
    weights = np.ones(len(values)) if weights is None else weights
    return Items(np.stack([values, weights], 1).astype(np.float64), _ratio)


def paired_bootstrap(gains: list[np.ndarray], seed: int = 0) -> Difference:
    """The mean over tasks of the mean gain, its percentile interval and p-value.

    Args:
        gains: for each task, per test item [n], how much more is right (between -1 and 1, a mean over seeds). Items are drawn
            with replacement within each task.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(PAIRED_RESAMPLES)
    for gain in gains:
        values, counts = np.unique(
            gain, return_counts=True
        )  # few: drawing how often each comes is drawing items
        total += (
            random.multinomial(len(gain), counts / len(gain), PAIRED_RESAMPLES) @ values / len(gain)
        )
    return of_resamples(float(np.mean([gain.mean() for gain in gains])), total / len(gains))


def of_resamples(mean: float, resampled: np.ndarray) -> Difference:
    """The percentile interval and the p-value of a difference from what it is in resamples.

    p is twice the share of resamples at or beyond no difference, on the rarer side, the sample itself counted in.
    """
    low, high = np.quantile(resampled, [0.025, 0.975])
    rarer = min((resampled <= 1e-12).sum(), (resampled >= -1e-12).sum())
    return Difference(
        mean, float(low), float(high), float(min(1.0, 2 * (rarer + 1) / (len(resampled) + 1)))
    )


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """Two-sided exact p of [n] right and wrong answers: whether those that differ differ as coins fall."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], np.finfo(np.float64).tiny)


def _resampled(sums: np.ndarray, seed: int) -> np.ndarray:  # [n, k] -> [RESAMPLES, k]
    """Sums over items drawn with replacement: equal seeds and numbers of items draw the same items."""
    counts = _counts(len(sums), seed)
    return np.concatenate(
        [counts[start : start + AT_ONCE] @ sums for start in range(0, RESAMPLES, AT_ONCE)]
    )


@lru_cache(
    maxsize=1
)  # drawing takes longer than adding up, and all measures of an evaluation share the draw
def _counts(
    n: int, seed: int
) -> np.ndarray:  # [RESAMPLES, n] how often each item is drawn; more than 255 times never
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
    if error == 0:  # equal values tell nothing of how they would vary
        return mean, np.nan, np.nan, np.nan
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1))
