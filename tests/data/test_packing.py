"""Best-fit packing: every example is whole and in exactly one row, and rows are nearly full.

A row reads as its examples, one after the other.
"""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from stanford_alpaca.data.batching import pad_to_multiple
from stanford_alpaca.data.packing import PackedExamples, best_fit, example_lengths


@settings(deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60), st.integers(32, 40), st.integers(0, 3))
def test_every_example_is_in_one_row_and_no_two_rows_could_be_one(lengths, capacity, seed):
    lengths = np.array(lengths, dtype=np.int64)
    rows = best_fit(lengths, capacity, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = sorted(int(lengths[row].sum()) for row in rows)
    assert all(1 <= total <= capacity for total in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity
    assert rows == best_fit(lengths, capacity, seed)


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Returns the sorted sums of the rows, searching all rows for each example."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, total in enumerate(sums) if total + length <= capacity]
        if fitting:
            sums[max(fitting, key=lambda i: sums[i])] += length
        else:
            sums.append(length)
    return sorted(sums)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40))
def test_the_fullest_row_that_has_room_is_taken(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    assert sorted(int(lengths[row].sum()) for row in best_fit(lengths, 50, 0)) == naive_best_fit(
        lengths.tolist(), 50
    )


def test_rows_of_alpacas_lengths_are_full_and_come_in_no_order_of_length():
    lengths = np.random.default_rng(0).lognormal(np.log(120), 0.6, 5000).astype(int).clip(2, 512)
    rows = best_fit(lengths, 512, 7)
    assert lengths.sum() / (len(rows) * 512) > 0.98
    longest = np.array([lengths[row].max() for row in rows])
    assert abs(np.corrcoef(longest, np.arange(len(rows)))[0, 1]) < 0.1
    assert rows != best_fit(lengths, 512, 8)


def test_an_example_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="an example has 9 tokens, a row 8"):
        best_fit(np.array([3, 9]), 8, 0)


@pytest.fixture
def examples():
    ids = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


def test_rows_are_their_examples_one_after_the_other(examples):
    packed = PackedExamples(examples, [[2, 0], [3, 1]])
    assert packed[0] == {
        "input_ids": [6, 7, 8, 9, 1, 2, 3],
        "labels": [-100, 7, 8, 9, -100, 2, 3],
        "lengths": [4, 3],
    }
    assert packed.row_lengths().tolist() == [7, 4]
    assert packed.report(8) == "packed 4 examples into 2 rows, 2.00 to a row, 68.8% full"
    filled = pad_to_multiple(packed, 3, token_id=0)
    assert (
        len(filled) == 3
        and filled[1] == packed[1]
        and filled[2] == {"input_ids": [], "labels": [], "lengths": []}
    )
    assert filled.row_lengths().tolist() == [7, 4, 0]


def test_lengths_are_those_of_selected_and_shuffled_examples(examples):
    assert example_lengths(examples.select([2, 1])).tolist() == [4, 2]
    assert len(PackedExamples.of(examples.select([2, 0, 3, 1]), 7, seed=0)) == 2
