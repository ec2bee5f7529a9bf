"""Intervals have the right width, and paired differences find what unpaired ones miss."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from stanford_alpaca.evaluation.intervals import Items, Replicates, mean_of


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    value, low, high = mean_of(values).measured()
    half = 1.96 * values.std(ddof=1) / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.03)


def test_a_ratio_sums_first_and_divides_once():
    assert mean_of(np.array([10.0, 1.0]), np.array([100.0, 1.0])).measured().value == pytest.approx(
        11 / 101
    )


def test_a_paired_difference_is_found_among_items_that_vary_more_than_it():
    random = np.random.default_rng(1)
    items = random.normal(0.0, 5.0, 300)
    better = items + random.normal(0.2, 0.3, 300)
    found = mean_of(better).minus(mean_of(items))
    assert found.mean == pytest.approx((better - items).mean())
    assert 0.1 < found.low < found.mean < found.high < 0.3
    assert found.p <= 0.001
    same = mean_of(items).minus(mean_of(items))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="300 and 200 test items"):
        mean_of(items).minus(mean_of(items[:200]))


def test_any_function_of_sums_has_an_interval():
    nll, tokens = np.arange(2.0, 42.0, 2.0), np.arange(1.0, 21.0)
    items = Items(np.stack([nll, tokens], 1), lambda sums: np.exp(sums[..., 0] / sums[..., 1]))
    value, low, high = items.measured()
    assert (value, low, high) == pytest.approx((np.exp(2),) * 3)


def test_replicates_have_students_interval():
    value, low, high = Replicates(np.array([1.0, 2.0, 3.0])).measured()
    assert (value, low, high) == pytest.approx(
        (2, 2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4
    )
    assert np.isnan(Replicates(np.array([1.0])).measured().low)
    found = Replicates(np.array([1.0, 2.0, 3.0])).minus(Replicates(np.array([0.0, 1.1, 1.9])))
    assert found.mean == pytest.approx(1.0)
    assert found.low == pytest.approx(1 - 4.30265 * 0.1 / 3**0.5, abs=1e-4)
    assert found.p == pytest.approx(0.0033, abs=1e-4)


def test_items_without_anything_to_measure_do_not_count():
    values, weights = np.arange(1.0, 21.0), np.ones(20)
    empty = mean_of(
        np.concatenate([values, np.zeros(200)]), np.concatenate([weights, np.zeros(200)])
    )
    assert empty.measured() == mean_of(values, weights).measured()
    assert empty.minus(mean_of(np.zeros(220), np.ones(220))).mean == pytest.approx(10.5)


def test_few_items_have_no_interval_and_no_p():
    few = mean_of(np.arange(9.0))
    assert (
        few.measured().value == 4
        and np.isnan(few.measured().low)
        and np.isnan(few.minus(mean_of(np.zeros(9))).p)
    )
    assert not np.isnan(mean_of(np.arange(10.0)).measured().low)


def test_p_is_that_of_the_t_test_where_both_hold():
    gains = np.random.default_rng(2).normal(0.14, 1.0, 100)
    found = mean_of(gains).minus(mean_of(np.zeros(100)))
    assert found.p == pytest.approx(ttest_1samp(gains, 0).pvalue, abs=0.03) and 0.05 < found.p < 0.5


def test_equal_seeds_tell_nothing_of_how_seeds_vary():
    found = Replicates(np.array([2.0, 2.0])).minus(Replicates(np.array([1.0, 1.0])))
    assert found.mean == 1 and np.isnan(found.low) and np.isnan(found.p)
