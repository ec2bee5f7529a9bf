"""Tests the experiments at toy size.

Checks what they make, that they continue where they stopped, and what their tables show.
"""

import gzip
import importlib.util
import json
import random

import pytest
import torch

from experiments import oracle, real, stationary, students, tables
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.errors import UserError
from stanford_alpaca.losses import Objective, emo_loss

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


def test_objectives_come_to_rest_where_their_gradient_is_zero():
    log_q = (2 * torch.randn(3, 12)).log_softmax(1)
    cost = CostEmbedding(torch.randn(12, 4))
    prices = cost.costs(torch.arange(12), 12).expand(3, -1, -1)
    log_p, residual = stationary.descend(Objective("mle"), log_q, None, 300)
    assert residual.max() < 1e-5
    found = stationary.describe(log_q, log_p)
    assert found["tau"].tolist() == pytest.approx([1] * 3, abs=1e-3) and found["tv"].max() < 1e-5
    log_p, residual = stationary.descend(Objective("emo"), log_q, prices, 1000)
    assert residual.max() < 1e-3
    # the gradient of the expectation over targets, by the public loss
    z = log_p[0].double().requires_grad_()
    each = emo_loss(z.expand(12, -1), torch.arange(12), cost, reduction="none")
    (gradient,) = torch.autograd.grad((log_q[0].exp() * each).sum(), z)
    assert gradient.abs().sum() < 1e-3
    away = log_q[0].double().requires_grad_()
    each = emo_loss(away.expand(12, -1), torch.arange(12), cost, reduction="none")
    (gradient,) = torch.autograd.grad((log_q[0].exp() * each).sum(), away)
    assert gradient.abs().sum() > 0.05


def test_tau_is_that_of_equal_entropy():
    log_q = (2 * torch.randn(4, 30, dtype=torch.float64)).log_softmax(1)
    for tau in (0.5, 1.7):
        found = stationary.describe(log_q, (log_q / tau).log_softmax(1))
        assert found["tau"].tolist() == pytest.approx([tau] * 4, rel=1e-6)
        assert found["slope"].tolist() == pytest.approx([1 / tau] * 4)
        assert found["r2"].tolist() == pytest.approx([1] * 4) and found["tv_tau"].max() < 1e-6
    assert stationary.describe(log_q, log_q)["tv"].max() == 0


def test_real_models_leave_a_file_a_run_and_go_on(tmp_path, monkeypatch, make_model, root, capsys):
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results")
    for name, value in {"STEPS": 5, "TOP": 20, "CONTEXTS": 2, "LENGTH": 8}.items():
        monkeypatch.setattr(stationary, name, value)
    (tmp_path / "models").mkdir()
    for name in stationary.MODELS:
        (tmp_path / "models" / name).symlink_to(root / "data" / "tiny-base")
    write_texts(tmp_path / "texts")
    arguments = {
        "models": str(tmp_path / "models"),
        "data": str(tmp_path / "texts"),
        "work": str(tmp_path / "work"),
    }
    real.run("E0", **arguments)
    found = json.loads((tmp_path / "results" / "real-E0.json").read_text())
    assert len(found["runs"]) == 2 * (4 + 4 * 4)
    assert (tmp_path / "results" / "real-E0.png").stat().st_size > 5000
    assert "| `emo` | centred |" in (tmp_path / "results" / "real-E0.md").read_text()
    (tmp_path / "work" / "E0" / "smollm2-135m-emo2-identity.json").unlink()
    capsys.readouterr()
    real.run("E0", **arguments)
    assert capsys.readouterr().out.count("making ") == 1
    assert json.loads((tmp_path / "results" / "real-E0.json").read_text()) == found
    for changes, message in (({"models": "none"}, "has no smollm2"), ({"data": "none"}, "english")):
        with pytest.raises(UserError, match=message):
            real.run("E0", **arguments | changes)
    with pytest.raises(UserError, match="--part E9: choose from E0"):
        real.run("E9", **arguments)
