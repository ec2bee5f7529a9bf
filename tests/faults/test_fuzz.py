"""A small part of the fuzzing: each input succeeds or is refused in one line.

FUZZ_CASES is the number of inputs of each kind: with 715, seven kinds have 5,005.
"""

import os
from collections import Counter

import pytest

from tests.faults.fuzz import Hang, check_command, check_file, fuzz_argv, fuzz_json, outcome
from tests.faults.fuzz_folders import KINDS, fuzz

CASES = int(os.environ.get("FUZZ_CASES", "30"))


@pytest.mark.parametrize("kind", ["data", "command lines"])
def test_what_is_nearly_right_ends_well(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    seen: Counter = Counter()
    for seed in range(CASES):
        case = (
            check_file(fuzz_json(seed, tmp_path))
            if kind == "data"
            else check_command(fuzz_argv(seed, tmp_path))
        )
        seen[outcome(case)] += 1
    assert seen["ok"] >= CASES // 15 and seen["refused"] >= CASES // 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_strangers_that_are_nearly_right_end_well(tmp_path, kind):
    seen = Counter(outcome(fuzz(kind, seed, tmp_path)) for seed in range(CASES))
    assert seen["ok"] >= CASES // 15 and seen["refused"] >= CASES // 4


def test_what_would_hang_and_what_would_fall_is_told():
    def hang():
        while True:
            pass

    with pytest.raises(Hang):
        outcome(hang, limit=1)
    with pytest.raises(ZeroDivisionError):
        outcome(lambda: 1 / 0)
