"""A part of ``python tests/exactness/run.py``, and checks of its combinations."""

from itertools import combinations, product

import pytest

from tests.exactness.combinations import DIMENSIONS, Combination, allowed, covering
from tests.exactness.run import LOSS, NORM, deviations, write_inputs

PART = [
    Combination("ddp", "shard", 4, 4, "uneven", "full", "packed"),
    Combination("fsdp", "replicate", 2, 1, "uneven", "lora", "padded"),
    Combination("fsdp", "vocab_parallel", 2, 4, "uneven", "full", "packed"),
    Combination("zero2", "shard", 2, 4, "uneven", "lora", "padded"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exactness")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("combination", PART, ids=str)
def test_it_equals_one_process(folder, combination):
    loss, norm = deviations(folder, combination)
    assert loss <= LOSS and norm <= NORM


def test_every_pair_that_can_be_had_occurs():
    chosen = covering()
    assert (
        chosen == covering()
        and len(set(chosen)) == len(chosen)
        and all(map(allowed, chosen + PART))
    )
    assert 20 <= len(chosen) <= 40
    possible = [c for c in product(*DIMENSIONS) if allowed(Combination(*c))]
    for i, j in combinations(range(len(DIMENSIONS)), 2):
        assert {(c[i], c[j]) for c in chosen} == {(c[i], c[j]) for c in possible}
    assert {c[:3] for c in chosen} == {c[:3] for c in possible}


def test_some_micro_batches_have_no_target_at_all(folder):
    """The 21 records are filled up to 32 rows, so 11 rows are masked.

    In micro-batches of one row, 11 have no target. The other responses differ a lot in length.
    """
    import json

    lengths = [
        len(record["output"].split()) for record in json.loads((folder / "uneven.json").read_text())
    ]
    assert len(lengths) == 21 and min(lengths) == 1 and max(lengths) == 105
