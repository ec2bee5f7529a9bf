"""Tests the benchmark of the loss on a tiny shape.

Checks that contenders compute what they are named for, and what is printed and kept. Measuring
processes are replaced by this process.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from benchmarks import contenders, loss, measure, states
from benchmarks.contenders import CONTENDERS, OURS, Case, Unavailable, make_batch
from stanford_alpaca import Objective, linear_emo_loss
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.errors import UserError
from stanford_alpaca.losses.backends import sampling
from stanford_alpaca.run.where import KEEP_MEMORY

TINY = Case("tiny", hidden=16, vocab=300, tokens=64)
FLAGS = {
    "hidden": 16,
    "vocab": 300,
    "tokens": 64,
    "rounds": 2,
    "threads": 1,
    "device": "cpu",
    "ids_from": "none",
}


class Here:
    """An executor that runs what is submitted immediately, in this process."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def here(monkeypatch):
    @contextmanager
    def worker(variables):
        yield Here()

    monkeypatch.setattr(measure, "worker", worker)
    monkeypatch.setattr(measure, "fresh_peak", measure.cpu_peak)


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_computes_what_it_is_named_for(name, monkeypatch):
    monkeypatch.setattr(sampling, "DENSE", 0.0)  # sampled gradients are then exact
    batch, same = make_batch(TINY), make_batch(TINY)
    try:
        ours = contenders.build(name, batch)()
    except Unavailable as reason:
        if name == "torch-chunked" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            pytest.skip(str(reason))
        assert name not in (
            "plain",
            "torch-chunked",
            "emoloss",
            "reference-frozen",
            "chunked-mle",
            "chunked-frozen",
        )
        pytest.skip(str(reason))
    kind = name.removesuffix("-sampled").rpartition("-")[2] if name in OURS else name
    if kind in ("frozen", "cached", "adaptive", "identity", "emoloss"):
        mode = Objective("emo", emo_ratio_cap=3.0) if kind == "emoloss" else "emo"
        cost = CostEmbedding(None, "identity") if kind == "identity" else same.embedding
        expected = linear_emo_loss(
            same.hidden, same.weight, same.targets, cost, mode=mode, backend="reference"
        )
    else:
        expected = cross_entropy(same.hidden @ same.weight.T, same.targets)
    ours.backward()
    expected.backward()
    # cached cost rows are in bf16
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if kind == "cached" else {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    if name == "dropped":  # it leaves out what is small, which random weights have much of
        tolerance = {"rtol": 0.2, "atol": 1e-2}
    torch.testing.assert_close(batch.hidden.grad, same.hidden.grad, **tolerance)
    torch.testing.assert_close(batch.weight.grad, same.weight.grad, **tolerance)


def test_the_batch_looks_like_a_language_models():
    batch = make_batch(replace(TINY, hidden=64, vocab=2000, tokens=1000))
    logits = (batch.hidden @ batch.weight.T).detach()
    assert 2.3 < logits[::2].std() < 2.7
    p = logits.softmax(1).gather(1, batch.targets[:, None])
    assert p[::2].median() < 0.01
    assert p[1::2].max() > 0.999
    counts = batch.targets.bincount(minlength=2000).sort(descending=True).values
    assert 90 < counts[0] < 160  # 1 / H(2000) = 12 %
    assert 1.5 < counts[0] / counts[1] < 2.7


def test_every_contender_has_its_row_and_its_line_of_json(here, tmp_path, capsys):
    loss.run(results=str(tmp_path), **FLAGS)
    loss.run(results=str(tmp_path), **FLAGS)  # replaces the rows of the first run
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "loss-cpu.jsonl").read_text().splitlines()]
    assert sorted(row["contender"] for row in rows) == sorted(["floor", *CONTENDERS])
    assert "N=64 H=16 V=300 float32, Zipf-distributed targets, 54.7 % unique" in out
    for row in rows:
        assert row["case"] == {
            "shape": "own",
            "hidden": 16,
            "vocab": 300,
            "tokens": 64,
            "device": "cpu",
            "dtype": "float32",
            "targets": "zipf",
            "unique_targets": 0.5469,
        }
        assert os.uname().nodename not in json.dumps(row["machine"])
        if "left_out" in row:
            assert f"left out: {row['contender']}: {row['left_out']}" in out
        else:
            assert [len(seconds) for seconds in row["seconds"].values()] == [2, 2]
            assert f"| {row['contender']} | {loss.median(row['seconds']['default']):.4f} (" in out


def test_ratios_are_of_ours_with_the_launcher_to_the_others_at_their_best(capsys):
    def row(name, default, launcher):
        return {
            "contender": name,
            "seconds": {"default": [default, 9.0, 0.0], "launcher": [launcher, 9.0, 0.0]},
        }

    rows = [
        row("floor", 0.5, 0.6),
        row("plain", 2.0, 4.0),
        row("torch-chunked", 8.0, 1.0),
        row("emoloss", 5.0, 4.0),
    ]
    rows.append(
        row("chunked-frozen", 0.8, 1.25)
        | {"peak_extra_mib": 12.4, "peak_tensors_mib": 9.0, "kept_mib": 3.0}
    )
    lines = loss.table([*rows, {"contender": "quack", "left_out": "not here"}]).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[0].endswith("/ plain | / torch-chunked | / emoloss | / fastest | share of floor |")
    assert lines[-1].startswith(
        "| chunked-frozen | 0.8000 (0.0000-9.0000) | 1.2500 (0.0000-9.0000) | 12 | 9 | 3 "
    )
    assert lines[-1].endswith("| 0.62 | 1.25 | 0.31 | 1.25 | 40 % |")
    # plain counts under its faster allocator
    assert lines[3].endswith("| 1.00 | 2.00 | 0.50 | 2.00 | 25 % |")


def test_peak_memory_of_plain_cross_entropy():
    case = replace(TINY, hidden=8, vocab=32000, tokens=512)
    peaks = measure.cpu_peak(measure.Setup(case, (), threads=1), "plain")
    # log-probabilities, their gradient, and the gradient of the logits
    logits = 512 * 32000 * 4 / 2**20
    assert peaks["peak_tensors_mib"] == pytest.approx(3 * logits, rel=1e-3)
    assert 2.9 * logits < peaks["peak_extra_mib"] < 3.5 * logits
    assert abs(peaks["kept_mib"]) < 1


def test_a_frozen_cost_is_kept_between_steps():
    case = replace(TINY, hidden=256, vocab=32000)
    peaks = measure.cpu_peak(measure.Setup(case, (), threads=1), "chunked-frozen")
    assert peaks["kept_mib"] == pytest.approx(256 * 32000 * 4 / 2**20, rel=0.1)


def test_the_allocator_settings_take_effect():
    """Freed blocks stay with the process.

    So allocating them again causes only a few page faults.
    """
    code = (
        "import resource\nfor _ in range(8): b'x' * 2**26\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )

    def faults(variables):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
        } | variables
        return int(
            subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, check=True
            ).stdout
        )

    assert faults(measure.ALLOCATOR) < faults({}) / 2
    assert measure.ALLOCATOR == KEEP_MEMORY  # what the launchers set


def test_workers_get_the_settings_and_this_process_does_not(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    with measure.worker(measure.ALLOCATOR) as pool:
        assert pool.submit(os.getenv, "MALLOC_MMAP_THRESHOLD_").result() == "4294967296"
        assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


def test_scaling_keeps_a_row_per_contender_and_size(here, tmp_path, capsys):
    loss.scaling(
        tokens=(32, 64),
        vocabularies=(300, 400),
        hidden=16,
        rounds=1,
        device="cpu",
        threads=1,
        results=str(tmp_path),
    )
    rows = [
        json.loads(line) for line in (tmp_path / "loss-scaling-cpu.jsonl").read_text().splitlines()
    ]
    cases = [
        (row["case"]["shape"], row["case"]["tokens"], row["case"]["vocab"])
        for row in rows
        if row["contender"] == "plain"
    ]
    assert cases == [
        ("tokens", 32, 300),
        ("tokens", 64, 300),
        ("vocabulary", 64, 300),
        ("vocabulary", 64, 400),
    ]
    assert capsys.readouterr().out.count("chunked-frozen ") == 4


def test_plots_are_drawn_from_the_rows_kept(here, tmp_path):
    pytest.importorskip("matplotlib")
    loss.run(results=str(tmp_path), only="plain,chunked-frozen", **FLAGS)
    loss.scaling(
        tokens=64,
        vocabularies=300,
        hidden=16,
        rounds=1,
        device="cpu",
        threads=1,
        results=str(tmp_path),
    )
    for name in ("loss-cpu.png", "loss-scaling-cpu.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_real_ids_are_the_supervised_tokens_of_the_records(root):
    ids, size = loss.response_ids(str(loss.SHIPPED), str(root / "data" / "tiny-base"), 30)
    assert size == 2048
    tokenizer = loss.ModelSource(str(root / "data" / "tiny-base")).tokenizer()
    first = json.loads(loss.SHIPPED.read_text())[0]["output"]
    assert first[:40] in tokenizer.decode(ids)
    with pytest.raises(UserError, match="give a larger file"):
        loss.response_ids(str(loss.SHIPPED), str(root / "data" / "tiny-base"), 10**6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shape": "gpt"}, "--shape gpt: choose from cpu, llama-7b"),
        ({"only": "plane"}, "--only plane: choose from plain"),
        ({"vocab": 300}, "--hidden and --vocab together"),
        ({"rounds": 0}, "--rounds 0: give a whole number from 1 on"),
        ({"round": 3}, "did you mean --rounds"),
        ({"tokens": 0}, "--tokens 0"),
        ({"threads": "x"}, "--threads x: give a whole number"),
        ({"device": "tpu"}, "--device tpu: choose cpu"),
        ({"dtype": "foo"}, "--dtype foo: choose from float32"),
        ({"results": __file__}, "is a file; give a folder"),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loss.run(**{"results": str(tmp_path / "new")} | flags)
    assert not (tmp_path / "new").exists()


def test_states_of_a_model_are_measured(here, tmp_path, capsys, root, monkeypatch):
    monkeypatch.setattr(sampling, "DENSE", 1.0)  # of 2,048 columns few are left out
    file = str(tmp_path / "tiny.safetensors")
    data = str(root / "data" / "instructions" / "held_out.json")
    states.write(states.Options(str(root / "data" / "tiny-base"), data=data, out=file, tokens=300))
    hidden, weight = (load_file(file)[name] for name in ("hidden", "weight"))
    assert hidden.shape == (300, weight.shape[1])
    names = "plain,dropped,chunked-frozen,chunked-frozen-sampled"
    results = str(tmp_path / "results")
    loss.run(states=file, tokens=256, rounds=1, only=names, threads=1, results=results)
    rows = {row["contender"]: row for row in loss.read(tmp_path / "results" / "loss-cpu.jsonl")}
    assert rows["floor"]["errors"] is None and "states" not in rows["plain"]["case"]
    exact, sampled = (rows[name]["errors"] for name in ("chunked-frozen", "chunked-frozen-sampled"))
    assert exact["d_hidden"] < 1e-5 < sampled["d_hidden"] < 0.05
    assert exact["columns"] is None and 0 < sampled["columns"] < 1
    assert "| chunked-frozen-sampled | " in capsys.readouterr().out
    with pytest.raises(UserError, match="it has 300 tokens, wanted 2048"):
        loss.run(states=file, results=results)
    with pytest.raises(UserError, match=r"not what benchmarks\.states"):
        loss.run(states=data, results=results)
    capsys.readouterr()
    states.compare_moments(states.Moments(file, tokens=64, seeds=2))
    # all of so small a vocabulary is multiplied
    assert "99 % of the squared norm" in (said := capsys.readouterr().out)
    assert said.count("ratio 1.000 in the median, 1.000 at most") == 4
