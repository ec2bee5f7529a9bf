"""Paired significance tests against cases worked out by hand."""

import numpy as np
import pytest

from stanford_alpaca.evaluation.fewshot.accuracy import (
    MEAN,
    accuracies,
    accuracy_table,
    compare_accuracy,
    comparison_table,
    right_by_task,
)
from stanford_alpaca.evaluation.intervals import PAIRED_RESAMPLES, mcnemar, paired_bootstrap


def test_the_bootstrap_of_two_items_one_of_them_won():
    """A resample of the gains (0, 1) has mean 0, 1/2 or 1, with probability 1/4, 1/2 or 1/4."""
    found = paired_bootstrap([np.array([0.0, 1.0])])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.p == pytest.approx(2 * 0.25, abs=0.02)


def test_the_bootstrap_where_nothing_or_everything_differs():
    assert paired_bootstrap([np.zeros(5)]) == (0.0, 0.0, 0.0, 1.0)
    assert paired_bootstrap([np.full(5, -1.0)]) == (-1.0, -1.0, -1.0, 2 / (PAIRED_RESAMPLES + 1))


def test_the_interval_is_that_of_a_binomial_and_of_the_mean_over_tasks():
    # The mean is 0.4, and its standard deviation is sqrt(0.24 / 100).
    gains = np.repeat([0.0, 1.0], [60, 40])
    found = paired_bootstrap([gains])
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.049, abs=0.012)
    # The mean of two tasks is 0, and its standard deviation is smaller by sqrt(2).
    both = paired_bootstrap([gains, -gains])
    assert both.mean == 0 and both.p > 0.9
    assert (both.high - both.low) / 2 == pytest.approx(1.96 * 0.049 / 2**0.5, abs=0.01)


def test_mcnemar_counts_the_items_that_differ():
    a = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool)
    # Five items are right in a alone, and one in b alone.
    b = np.array([0, 0, 0, 0, 0, 1, 1, 0], bool)
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(a, a) == 1.0


def rows(predictions: dict[str, list[list[int]]]) -> list[dict]:
    """Returns rows from predictions by task, seed and item; every label is 1."""
    return [
        {"task": task, "seed": seed, "label": 1, "prediction": prediction}
        for task, seeds in predictions.items()
        for seed, items in enumerate(seeds)
        for prediction in items
    ]


def test_accuracies_are_means_over_seeds_and_tasks():
    first = right_by_task(rows({"x": [[1, 1, 0, 0], [1, 1, 1, 0]], "y": [[1, 0], [1, 0]]}))
    other = right_by_task(rows({"x": [[1, 1, 1, 0], [1, 1, 1, 0]], "y": [[1, 1], [1, 1]]}))
    assert accuracies(first) == {"x": [0.5, 0.75], "y": [0.5, 0.5], MEAN: [0.5, 0.625]}
    table = accuracy_table({"a": accuracies(first), "b": accuracies(other)}).splitlines()
    assert table[1].split() == ["x", "62.50", "±", "17.68", "75.00", "±", "0.00"]
    found = compare_accuracy(first, other)
    assert [found[task]["mean"] for task in ("x", "y", MEAN)] == [0.125, 0.5, 0.3125]
    assert "mcnemar_p" not in found["x"]  # one seed only
    one = {"x": first["x"][:1]}
    assert compare_accuracy(one, {"x": other["x"][:1]})["x"]["mcnemar_p"] == 1.0  # one item differs
    printed = comparison_table("a", "b", compare_accuracy(one, {"x": other["x"][:1]})).splitlines()
    assert printed[0] == "b against a, paired bootstrap over test items, 10,000 resamples:"
    assert printed[2].split()[:2] == ["x", "+25.00"] and printed[2].split()[-1] == "1.0000"
