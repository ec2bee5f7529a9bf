"""Tests the sweep over modes: what is run, what is kept, and what the tables show.

Fixed figures replace training.
"""

import json

import pytest

from benchmarks import modes
from stanford_alpaca.errors import UserError

FIGURES = {
    "nll": 0.5,
    "emo": 0.125,
    "token_accuracy": 0.75,
    "norm_first": 4.0,
    "norm_p10": 0.5,
    "norm_median": 1.0,
    "norm_p90": 2.0,
    "clipped": 0.5,
    "steps": 2,
}


@pytest.fixture
def runs(monkeypatch):
    """Returns the list of runs that were made.

    Exact match is seed / 100, and ten points higher at the higher learning rate.
    """
    made = []

    def one_run(*key):
        made.append(key)
        return FIGURES | {"exact_match": key[3] / 100 + (0.1 if key[1] > 1e-3 else 0)}

    monkeypatch.setattr(modes, "one_run", one_run)
    return made


def test_runs_are_kept_and_not_repeated(runs, tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    modes.run(modes="emo", learning_rates=1e-4, seeds=20, results=str(file))
    modes.run(modes=("mle", "emo"), learning_rates=(1e-4, 1e-2), seeds=20, results=str(file))
    wanted = [("emo", 1e-4), ("mle", 1e-4), ("mle", 1e-2), ("emo", 1e-2)]
    assert sorted(runs) == sorted((mode, rate, 1.0, 20, 2) for mode, rate in wanted)
    assert [
        tuple(json.loads(line)[name] for name in modes.KEY)
        for line in file.read_text().splitlines()
    ] == runs


def test_tables_give_the_mean_of_the_seeds_and_the_best_rate(runs, tmp_path, capsys):
    file = str(tmp_path / "results.jsonl")
    modes.run(
        modes="emo",
        learning_rates=(1e-4, 1e-2),
        max_grad_norms=(1, 0),
        seeds=(20, 40),
        results=file,
    )
    modes.run(modes="mle", learning_rates=1e-4, epochs=1, seeds=20, results=file)
    capsys.readouterr()
    modes.run(modes="mle", learning_rates=1e-4, seeds=20, results=file)
    out = capsys.readouterr().out
    assert (
        "| mode | 0.0001, clip 1 | 0.01, clip 1 | 0.0001, no clipping | 0.01, no clipping |" in out
    )
    assert "| mle | 20.0 | - | - | - |" in out
    assert "| emo | 30.0 ± 10.0 | 40.0 ± 10.0 | 30.0 ± 10.0 | 40.0 ± 10.0 |" in out
    assert (
        "| emo | 0.01 | 40.0 ± 10.0 | 75.0 ± 0.0 | 0.500 | 0.1250 | 4 | 0.5 / 1 / 2 | 50.0 ± 0.0 |"
        in out
    )


def test_a_mistyped_flag_runs_nothing(runs, tmp_path):
    with pytest.raises(UserError, match="did you mean --seeds"):
        modes.run(seed=3, results=str(tmp_path / "results.jsonl"))
    assert not runs
