"""``tests/gpu.sh``: no part hides another, the float64 side is right, and all of it runs."""

import argparse
import json
import os
import subprocess
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import contenders, states
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import kernels, loss, profile, training
from benchmarks.gpu.figures import Figures, Setting
from stanford_alpaca import linear_emo_loss

PART = "import json, os, signal, subprocess, sys, time\nout = sys.argv[2]\n"
FIGURE = {"what": "x", "value": 1.5, "unit": "ms", "note": "", "ok": True, "raw": None}
FIGURES = f"json.dump([{FIGURE!r}], open(out, 'w'))\n"
HANG = (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen(['sleep', '600'], process_group=0)\n"
    "print(child.pid, flush=True)\ntime.sleep(600)\n"
)


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path / "part.json", toy=True)


def test_a_part_that_fails_or_hangs_hides_no_other(tmp_path, monkeypatch, capsys):
    bodies = {"good": FIGURES, "hangs": FIGURES + HANG, "fails": "raise ValueError('no GPU')"}
    package = tmp_path / "fake_parts"
    package.mkdir()
    for name, body in bodies.items():
        (package / f"{name}.py").write_text(PART + body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "PARTS", "fake_parts")
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(
        gpu, "GROUPS", (gpu.Group(("hangs", "fails"), 3, 3), gpu.Group(("good",), 60, 60))
    )
    out = tmp_path / "out"
    out.mkdir()
    given = argparse.Namespace(out=out, toy=False, all=False, states=None)
    assert not gpu.run(given)
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "hangs": "out of time",
        "fails": "ended with status 1",
        "good": "done",
    }
    assert parts["hangs"]["figures"] == parts["good"]["figures"] == [FIGURE]
    printed = capsys.readouterr().out
    assert "failed: fails: ended with status 1; ValueError: no GPU" in printed
    assert printed.rstrip().endswith("2 failed")
    assert sorted(file.name for file in out.iterdir()) == [
        "fails.log",
        "good.log",
        "gpu.json",
        "hangs.log",
    ]
    child = int((out / "hangs.log").read_text())  # in a process group of its own
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "Z" in state(child):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the part's child is still there")


def state(process: int) -> str:
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("mode", kernels.MODES)
def test_a_wrong_objective_is_seen(mode, kind, setting, monkeypatch):
    """The float64 side has its own formulas, so another mode must fail."""
    kind = "no" if mode == "mle" else kind

    def with_mode(wanted):
        def ours(*given, mode, backend):
            return linear_emo_loss(*given, mode=wanted, backend="chunked")

        figures = Figures(setting.out)
        monkeypatch.setattr(kernels, "linear_emo_loss", ours)
        kernels.loss(130, mode, kind, "x", setting, figures)
        return figures.found[0].ok

    assert with_mode(mode)
    assert mode == "mle" or not with_mode("emd" if mode != "emd" else "emo")


def test_losses_far_from_the_cpus_fail(setting):
    figures = Figures(setting.out)
    known = {"float32": [3.0, 2.0, 1.0], "bfloat16": [3.0, 2.1, 1.0]}  # 0.02 + 2 * 0.1 allowed
    training.compared("near", [3.0, 2.2, 1.0], known, figures)
    training.compared("far", [3.0, 2.0, 1.23], known, figures)
    training.compared("short", [3.1, 2.0], known, figures)
    assert [each.ok for each in figures.found] == [True, False, True]
    assert [each.value for each in figures.found] == pytest.approx([0.2, 0.23, 0.1])
    assert [each["ok"] for each in json.loads(setting.out.read_text())] == [True, False, True]


def test_a_cpus_losses_are_known_for_every_form():
    known = json.loads(training.EXPECTED.read_text())["losses"]
    assert set(known) == set(training.FORMS)
    for form in known.values():
        assert [len(form[dtype]) for dtype in ("float32", "bfloat16")] == [training.COMPARED] * 2
        assert 2.5 < form["float32"][0] < 4
        assert form["float32"] != form["bfloat16"]


def test_gaps_are_what_no_kernel_covers():
    assert profile.covered([(0, 4), (2, 3), (3, 6), (10, 12)]) == (8, 12)
    spans = [(0, 2_000_000, "a"), (2, 5_000_002, "b"), (9, 1_000_009, "a")]
    assert profile.longest(spans) == {"b": 5.0, "a": 3.0}


def test_a_failed_measurement_is_a_figure_and_the_next_one_counts(setting):
    figures = Figures(setting.out)
    figures.attempt("bad", lambda: 1 / 0)
    figures.attempt("good", partial(figures.add, "good", 2.0, "ms"))
    assert [(each.what, each.ok) for each in figures.found] == [("bad", False), ("good", None)]
    assert figures.found[0].note == "ZeroDivisionError: division by zero"


def test_states_with_the_output_layer_in_8_bits(tmp_path, root):
    file, small = tmp_path / "full.safetensors", tmp_path / "small.safetensors"
    data = str(root / "data" / "instructions" / "held_out.json")
    for out, flags in ((file, {}), (small, {"small": True})):
        states.run(str(root / "data" / "tiny-base"), data=data, out=str(out), tokens=64, **flags)
    exact, close = load_file(file), contenders.read_states(str(small))
    assert load_file(small)["weight"].dtype == torch.int8
    assert small.stat().st_size < 0.3 * file.stat().st_size
    bound = exact["weight"].abs().amax(1, keepdim=True) / 253
    off = (close["weight"] - exact["weight"]).abs()
    assert (off <= bound).all() and off.max() > 0
    assert torch.equal(close["hidden"].float(), exact["hidden"].bfloat16().float())
    assert states.read_shape(str(small)) == (64, 160, 2048)
    (_, case) = loss.cases(Setting(tmp_path / "x", toy=True, states=str(small)))
    torch.testing.assert_close(contenders.make_batch(case).weight.detach(), close["weight"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--states", "nowhere"], "error: --states nowhere: no such file"),
        (["--out", "README.md"], "error: --out README.md: it has results; give another folder, or"),
        (["--tory"], "error: unrecognized arguments: --tory"),
    ],
)
def test_bad_flags_are_one_line(flags, message, root):
    done = subprocess.run(
        ["bash", "tests/gpu.sh", *flags], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_the_script_runs_every_part_at_toy_size(root, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    out = tmp_path / "out"
    command = ["bash", "tests/gpu.sh", "--toy", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("kernels", "training", "loss", "whole", "profile", "blocks"), "done"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(list(out.iterdir())) <= 8
    found = {each["what"] for part in parts.values() for each in part["figures"]}
    assert {"losses, train_emo.sh", "losses, FSDP2, one rank", "generate", "emo"} <= found
    assert {"toy chunked-cached-sampled", "emo / trl", "step, training", "preflight, emo"} <= found
