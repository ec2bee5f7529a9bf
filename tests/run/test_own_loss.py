"""A run with a loss from a file: the same steps, the copy, the record, and whose code runs."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from stanford_alpaca.errors import ResumeError, UserError
from stanford_alpaca.losses.own import COPY
from stanford_alpaca.run.parse import parse
from stanford_alpaca.run.where import Devices, where_to_run
from stanford_alpaca.train import train
from tests.helpers import refusal, steps
from tests.ranks import run_ranks

FILE = Path(__file__).parents[1] / "losses" / "own_modes.py"


@pytest.fixture
def twice(arguments, tmp_path):
    """Trains with a built-in mode and with its restatement, and returns both folders."""

    def both(mode, *flags, ranks=0, **changes):
        for name, loss in ((mode, {}), ("own", {"loss": f"{FILE}:{mode}", "mode": None})):
            made = {"mode": mode, "output_dir": tmp_path / name} | changes | loss
            argv = arguments(*flags, **made)
            run_ranks(ranks, train, argv) if ranks else train(argv)
        return tmp_path / mode, tmp_path / "own"

    return both


def assert_equal(one, two, weights="model.safetensors"):
    shown = ("loss", "nll", "emo", "grad_norm")
    for a, b in zip(steps(one), steps(two), strict=True):
        assert {name: a.get(name) for name in shown} == {name: b.get(name) for name in shown}
    assert (one / weights).read_bytes() == (two / weights).read_bytes()


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("emo", {}),
        ("mle", {}),
        ("emo2", {"packing": True, "model_max_length": 256}),
        ("emo2", {"lora": True}),
        ("dft", {"padding_free": True, "head_gradient": "sampled"}),
        ("emo", {"loss_backend": "reference"}),
    ],
)
def test_its_steps_are_those_of_the_built_in_mode(twice, mode, changes):
    weights = "adapter_model.safetensors" if "lora" in changes else "model.safetensors"
    assert_equal(*twice(mode, max_steps=2, **changes), weights)


@pytest.mark.parametrize(
    ("engine", "sharding"), [("ddp", "shard"), ("fsdp", "vocab_parallel"), ("zero2", "replicate")]
)
def test_so_they_are_on_two_processes(twice, engine, sharding):
    changes = {"engine": engine, "cost_sharding": sharding, "max_steps": 2}
    assert_equal(*twice("emo2", ranks=2, **changes))


def test_the_run_keeps_the_file_and_repeats_from_it(arguments, tmp_path, capsys):
    file = shutil.copy(FILE, tmp_path / "mine.py")
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    flags = {"mode": None, "loss": f"{file}:emo2"} | saves
    train(arguments(**flags))
    out = tmp_path / "out"
    said = capsys.readouterr().out
    assert said.count("runs with your rights") == 1 and "mine.py:emo2, frozen" in said
    assert (out / COPY).read_bytes() == FILE.read_bytes()
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert record["loss"] == f"{file}:emo2" and "mode" not in record
    assert record["made_with"]["content of --loss"].startswith("sha256:")
    assert "objective `mine.py:emo2`" in (out / "README.md").read_text()

    # the copy, under another name, is the same loss
    again = {"output_dir": tmp_path / "on", "resume_from_checkpoint": out / "checkpoint-1"}
    train(arguments(**flags | again | {"loss": f"{out / COPY}:emo2"}))
    assert "--loss was" not in capsys.readouterr().out
    assert_equal(out, tmp_path / "on")

    # another content, or another function of it, is another run
    Path(file).write_text(FILE.read_text().replace("0.5 * nll", "0.4 * nll"))
    with pytest.raises(ResumeError, match="the file of --loss has changed") as error:
        train(arguments(resume="auto", **flags))
    assert error.value.status == 3
    with pytest.raises(ResumeError, match="--loss was emo2, is mix"):
        train(arguments(resume="auto", **flags | {"loss": f"{out / COPY}:mix"}))
    train(arguments(**flags | again | {"output_dir": tmp_path / "new"}))
    assert "checkpoint-1: the file of --loss has changed" in capsys.readouterr().out
    with pytest.raises(ResumeError, match="--loss was emo2, is not given"):
        train(arguments(resume="auto", **saves))


INJECTED = {
    "loss": "{}:emo",
    "lo-ss": "x",
    "report_to": ["none", "--loss", "{}:emo"],
    "report_to ": "--loss={}:emo",
    "loss={}:emo": [],
}


def test_no_file_of_flags_brings_code(arguments, tmp_path, capsys, monkeypatch):
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef emo(nll, log_emo): return nll\n")
    config = tmp_path / "theirs.yaml"
    for key, value in INJECTED.items():
        filled = [each.format(evil) for each in value] if isinstance(value, list) else value
        filled = filled.format(evil) if isinstance(filled, str) else filled
        config.write_text(yaml.safe_dump({key.format(evil): filled}))
        argv = ["--config", str(config), *arguments(mode=None)]
        status, line = refusal(capsys, monkeypatch, lambda argv=argv: train(argv), tmp_path / "out")
        assert status == 2
        if key == "loss":
            assert "its --loss runs code of others" in line
        if key != "lo-ss":
            with pytest.raises(UserError, match=r"--config .*theirs.yaml: "):
                where_to_run(argv, {}, Devices(0, False, 2))
    assert not (tmp_path / "ran").exists()

    for name in ("trust_remote_code", "trust-remote-code"):
        config.write_text(f"{name}: true")
        with pytest.raises(UserError, match="its --trust_remote_code runs code of others"):
            parse(["--config", str(config), *arguments()])
        assert parse(["--config", str(config), "--trust_remote_code", *arguments()])
        config.write_text(f"{name}: false")
        assert not parse(["--config", str(config), *arguments()]).model.trust_remote_code

    # what the user names themselves is run, whatever the file says
    config.write_text(yaml.safe_dump({"loss": f"{evil}:emo", "mode": "emd"}))
    run = parse(["--config", str(config), *arguments(mode=None, loss=f"{FILE}:emo2")])
    assert run.objective.loss == f"{FILE}:emo2" and run.objective.name == "own_modes.py:emo2"
    run = parse(["--config", str(config), *arguments(mode="dft")])
    assert run.objective.loss is None and run.objective.mode == "dft"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--mode and --loss exclude each other: drop one"),
        ({"mode": None, "loss": "none.py:emo"}, "--loss none.py:emo: none.py cannot be read"),
        ({"mode": None, "loss": "emo"}, "--loss emo: give FILE.py:NAME"),
        ({"mode": None, "emo_ratio_cap": 3.0}, "--emo_ratio_cap has to be above 0 and belongs to"),
        ({"mode": None, "teacher": "t"}, "--teacher and --loss exclude each other"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    arguments, tmp_path, capsys, monkeypatch, changes, message
):
    argv = arguments(**{"loss": f"{FILE}:emo"} | changes)
    status, line = refusal(capsys, monkeypatch, lambda: train(argv), tmp_path / "out")
    assert status == 2 and re.search(re.escape(message), line)


def test_a_recipes_mode_makes_room(arguments):
    run = parse(arguments(mode=None, loss=f"{FILE}:emo"), {"mode": "emo2", "lora": True})
    assert run.objective.name == "own_modes.py:emo" and run.lora.lora


def test_ranks_with_other_files_do_not_train_together(arguments, tmp_path):
    flags = arguments(mode=None, loss=f"{tmp_path / 'rank'}RANK.py:emo", engine="ddp")
    for rank, source in enumerate((FILE.read_text(), FILE.read_text() + "\n")):
        (tmp_path / f"rank{rank}.py").write_text(source)
    with pytest.raises(AssertionError, match="the file is another one than that of rank 0"):
        run_ranks(2, with_own_file, flags)


def with_own_file(argv):
    import os

    train([word.replace("RANK", os.environ["RANK"]) for word in argv])
