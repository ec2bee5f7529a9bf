"""Tests the experiments at toy size.

Checks what they make, that they continue where they stopped, and what their tables show.
"""

import gzip
import importlib.util
import json
import random

import pytest
import torch

from experiments import oracle, students, tables

WORDS = (
    "the a old new king river said went saw and to of city house red small people year government "
    "president war peace"
).split()


def write_texts(folder):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) + ".\n" for _ in range(600)]
    folder.mkdir()
    with gzip.open(folder / "english.txt.gz", "wt") as file:
        file.writelines(lines)
    (folder / "wikitext2_valid.txt").write_text("".join(lines[:100]))
    return folder


@pytest.mark.skipif(importlib.util.find_spec("mauve") is None, reason="needs mauve-text")
def test_the_oracle_experiment_measures_every_student_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(oracle, "RESULTS", tmp_path)
    arguments = {
        "text_dir": str(write_texts(tmp_path / "texts")),
        "scale": "smoke",
        "work": str(tmp_path / "work"),
        "processes": 1,
    }
    oracle.run(**arguments)
    found = json.loads((tmp_path / "oracle-smoke.json").read_text())
    runs = {(run["setting"], run["arm"], run["seed"]): run["measures"] for run in found["runs"]}
    assert len(runs) == 2 + 2 * 2  # start, oracle, and two objectives with two seeds each
    truth = runs["80 sequences", "oracle", 0]
    assert truth["total_variation"] == truth["optimal_transport"] == 0
    assert truth["forward_cross_entropy"] == pytest.approx(truth["reverse_cross_entropy"])
    learned, start = runs["80 sequences", "mle", 0], runs["80 sequences", "start", 0]
    assert learned["forward_cross_entropy"] > truth["forward_cross_entropy"]
    assert learned["total_variation"] < start["total_variation"]
    assert runs["80 sequences", "emo", 0]["transport_cost"] != learned["transport_cost"]
    assert (tmp_path / "oracle-smoke.png").stat().st_size > 10_000
    (here,) = (tmp_path / "work").rglob("students")
    sets = [
        {tuple(row) for row in torch.load(here.parent / f"{name}.pt").tolist()}
        for name in ("corpus", "dev", "test")
    ]
    assert (
        [len(rows) for rows in sets] == [80, 8, 24]
        and not sets[0] & (sets[1] | sets[2])
        and not sets[1] & sets[2]
    )
    # Only the rate that did best on the development set is trained with the second seed.
    for objective in ("mle", "emo"):
        nll = {
            rate: json.loads((here / f"{objective}-80-{rate}-0" / "dev.json").read_text())
            for rate in ("0.001", "0.003")
        }
        best = min(nll, key=lambda rate: nll[rate]["dev_nll"])
        assert [folder.name for folder in here.glob(f"{objective}-*-1")] == [
            f"{objective}-80-{best}-1"
        ]
    capsys.readouterr()

    monkeypatch.setattr(students, "fit", None)  # nothing may be trained again
    (next((tmp_path / "work").rglob("measured/emo-80-*-1.json"))).unlink()
    oracle.run(**arguments)
    assert capsys.readouterr().out.count("making ") == 1
    assert json.loads((tmp_path / "oracle-smoke.json").read_text())["runs"] == found["runs"]


def test_tables_pair_by_seed_and_mark_what_is_clear():
    runs = [
        {"setting": "few", "arm": arm, "seed": seed, "measures": {"nll": value}}
        for arm, values in {
            "mle": [1.0, 2.0, 3.0],
            "emo": [0.8, 1.81, 2.79],
            "emd": [1.0, 1.0, 4.0],
        }.items()
        for seed, value in enumerate(values)
    ]
    assert "| mle | 2.0000 ± 1.0000 |" in tables.means(runs)
    rows = tables.differences(runs).splitlines()
    assert "| emo - mle | -0.2000 [-0.2248, -0.1752] * |" in rows
    assert "| emd - mle | +0.0000 [-2.4841, +2.4841] |" in rows
    assert tables.bold({1e-4: 3.0, 1e-3: 1.0}) == ["0.0001: 3.0000", "**0.001: 1.0000!**"]
    assert tables.bold({1e-4: 3.0, 1e-3: 1.0, 1e-2: 2.0})[1] == "**0.001: 1.0000**"
    runs.append({"setting": "few", "arm": "dft", "seed": 1, "measures": {"nll": 5.0}})
    runs.append({"setting": "few", "arm": "dft", "seed": 2, "measures": {"nll": 6.0}})
    # The pairs are seeds 1 and 2 of both arms.
    assert "| dft - mle | +3.0000 |" in tables.differences(runs).splitlines()
