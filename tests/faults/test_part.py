"""A fixed part of ``python tests/faults/run.py --full``, and checks of its cases."""

import pytest

from tests.faults.run import ROWS, SEED, cases_of, hold, part_of
from tests.faults.world import World

COUNTS = {
    "five equal runs": 6,
    "kill the group": 100,
    "kill in a save": 60,
    "kill one rank": 20,
    "SIGTERM": 24,
    "full and failing disks": 20,
    "damaged files": 60,
    "pickled code": 12,
    "wrong weights": 15,
    "resume at every step": 100,
    "other world sizes": 12,
    "two runs in a folder": 4,
    "damaged caches": 18,
    "NaN and Inf": 12,
    "fully masked rows": 9,
    "fuzzed inputs": 1000,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("row", ROWS)
def test_it_holds(world, row):
    lost = [
        outcome
        for number in part_of(COUNTS[row])
        if (outcome := hold(world, row, SEED, number)) is not None
    ]
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("row", ROWS)
def test_the_cases_follow_from_the_seed(row):
    first, again, other = (
        [case.what for case in cases_of(row, seed)] for seed in (SEED, SEED, SEED + 1)
    )
    assert len(first) == COUNTS[row] and first == again
    assert len(set(first)) == len(first), "two cases of one description"
    assert len(other) == len(first)
