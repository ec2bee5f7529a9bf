"""Energy distance (Szekely and Rizzo 2013) between responses and references, as clouds of features.

With x and y from two distributions it is 2 E|x - y| - E|x - x'| - E|y - y'|, and 0 only if they are
one. All three means are over pairs of different records, so its estimate is 0 on average where a
response and its reference are equally likely to have been drawn from one distribution, given their
prompt. That is also what the permutation test exchanges: which text of a record is the reference.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from stanford_alpaca.evaluation.intervals import Difference, Measured

PERMUTATIONS = 1999
PERMUTED_AT_ONCE = 100  # permutations at a time


class Clouds(NamedTuple):
    """The features of the references and of the responses to the same prompts."""

    references: np.ndarray  # [n, D]
    responses: np.ndarray  # [seeds, n, D]

    def measured(self) -> Measured:
        """Returns the energy distance. It has no interval."""
        return Measured(self._statistics(None)[0], np.nan, np.nan)

    def p(self, seed: int = 0) -> float:
        """Returns the p-value of the test that responses and references are one distribution."""
        observed, *permuted = self._statistics(seed)
        return _share(np.array(permuted) >= observed - 1e-12)

    def minus(self, other: "Clouds", seed: int = 0) -> Difference:
        """Returns the difference of two models' distances to the same references.

        It has no interval. The p-value is that of a permutation test that exchanges the two
        models' responses to a prompt.
        """
        seeds, n, _ = self.responses.shape
        if other.responses.shape[:2] != (seeds, n):
            raise ValueError(f"{n} and {other.responses.shape[1]} responses cannot be paired")
        both = np.concatenate([self.responses, other.responses]).reshape(2 * seeds * n, -1)
        record = np.tile(np.arange(n), 2 * seeds)
        to_reference = cdist(both, self.references)
        to_reference[np.arange(len(both)), record] = 0
        crossed, within = to_reference.sum(1), _distances(both, record)
        total, pairs = within.sum(1), n * (n - 1)

        def difference(mine: np.ndarray) -> np.ndarray:  # [m, 2 seeds n] 0 or 1 -> [m]
            # x'Dx - (1 - x)'D(1 - x): sums over pairs within each model
            square = 2 * (mine @ total) - total.sum()
            cross = 2 * (mine @ crossed) - crossed.sum()
            return 2 * cross / (seeds * pairs) - square / (seeds**2 * pairs)

        observed = np.repeat([1.0, 0.0], seeds * n)
        random = np.random.default_rng(seed)
        found = [difference(observed[None])]
        for count in _parts(PERMUTATIONS):
            first = random.integers(0, 2, (count, seeds * n)).astype(float)
            found.append(difference(np.concatenate([first, 1 - first], 1)))
        values = np.concatenate(found)
        far = np.abs(values[1:]) >= abs(values[0]) - 1e-12
        return Difference(float(values[0]), np.nan, np.nan, _share(far))

    def _statistics(self, seed: int | None) -> np.ndarray:
        """Returns the energy distance, and with a seed those of PERMUTATIONS permutations."""
        seeds, n, _ = self.responses.shape
        texts = np.concatenate([self.references[None], self.responses])
        record = np.tile(np.arange(n), seeds + 1)
        within = _distances(texts.reshape((seeds + 1) * n, -1), record)
        total, pairs = within.sum(1), n * (n - 1)

        def statistic(chosen: np.ndarray) -> np.ndarray:  # [m, n] text of each record -> [m]
            mine = np.zeros((len(chosen), (seeds + 1) * n))
            np.put_along_axis(mine, chosen * n + np.arange(n), 1.0, 1)
            inside = ((mine @ within) * mine).sum(1)
            cross = mine @ total - inside
            outside = total.sum() - 2 * cross - inside
            return 2 * cross / (seeds * pairs) - inside / pairs - outside / (seeds**2 * pairs)

        found = [statistic(np.zeros((1, n), dtype=int))]
        if seed is not None:
            random = np.random.default_rng(seed)
            for count in _parts(PERMUTATIONS):
                found.append(statistic(random.integers(0, seeds + 1, (count, n))))
        return np.concatenate(found)


def _distances(points: np.ndarray, record: np.ndarray) -> np.ndarray:  # [m, D], [m] -> [m, m]
    """Returns Euclidean distances, and 0 between texts of one record."""
    return np.where(record[:, None] == record, 0.0, cdist(points, points))


def _parts(count: int) -> Iterator[int]:
    for start in range(0, count, PERMUTED_AT_ONCE):
        yield min(PERMUTED_AT_ONCE, count - start)


def _share(extreme: np.ndarray) -> float:
    """Returns the share of permutations that are as extreme. The sample counts as one of them."""
    return float((extreme.sum() + 1) / (len(extreme) + 1))
