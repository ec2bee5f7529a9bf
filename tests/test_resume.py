"""Where a run starts: what counts as the same run, what is passed over, what is complete."""

import json
import shutil

import pytest
import yaml

from stanford_alpaca import train as command
from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.errors import ResumeError, Stopped, UserError
from stanford_alpaca.record import changes
from stanford_alpaca.resumable import ResumableTrainer
from stanford_alpaca.train import train
from tests.helpers import evaluations, steps

RECORD = {
    "learning_rate": 1e-3,
    "data_path": ["a.json"],
    "engine": "ddp",
    "made_with": {"torch": "2", "model": "x", "data": {"a.json": "d"}},
}


@pytest.mark.parametrize(
    ("change", "matters", "rounds"),
    [
        ({"learning_rate": 1e-4}, ["--learning_rate was 0.001, is 0.0001"], []),
        ({"learning_rate": None}, ["--learning_rate was 0.001, is not given"], []),
        ({"lora": True}, ["--lora was not given, is True"], []),
        ({"engine": "fsdp"}, [], ["--engine was ddp, is fsdp"]),
        ({"logging_steps": 3, "output_dir": "elsewhere", "save_steps": 2}, [], []),
        ({"data_path": ["b.json"]}, ["--data_path: b.json is not what it was"], []),
        ({"made_with": RECORD["made_with"] | {"torch": "3"}}, [], ["torch was 2, is 3"]),
        ({"made_with": RECORD["made_with"] | {"model": "y"}}, ["the model has changed"], []),
        ({"made_with": RECORD["made_with"] | {"rows_per_step": 8}}, ["rows_per_step was None, is 8"], []),
        ({"data_path": ["c.json"], "made_with": RECORD["made_with"] | {"data": {"c.json": "d"}}}, [], []),  # moved
    ],
)
def test_what_makes_another_run_of_it(change, matters, rounds):
    assert changes(RECORD, RECORD | change) == (matters, rounds)
    assert changes(json.loads(json.dumps(RECORD)), RECORD) == ([], [])


@pytest.fixture
def interrupted(arguments, tmp_path):
    """A run of three steps with a checkpoint of each, as if killed at the end: no model in the output folder."""
    settings = {"save_strategy": "steps", "save_steps": 1, "resume": "auto"}
    train(arguments(**settings))
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in (manifest.FILE, "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    return lambda **changes: arguments(**settings | changes)


def test_it_goes_on_from_the_newest_good_one_and_says_what_it_passed_over(interrupted, tmp_path, capsys):
    out = tmp_path / "out"
    weights = (out / "checkpoint-3" / "optimizer.pt").read_bytes()
    (out / "checkpoint-3" / "optimizer.pt").write_bytes(weights[:-1] + b"x")
    (out / "checkpoint-2" / "rng_state.pth").unlink()
    train(interrupted())
    said = capsys.readouterr().out
    assert "passed over checkpoint-3: optimizer.pt: its content has changed" in said
    assert "passed over checkpoint-2: rng_state.pth: not there" in said and f"going on from {out / 'checkpoint-1'}" in said
    assert [entry["loss"] for entry in steps(out)] == [entry["loss"] for entry in steps(tmp_path / "whole")]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert manifest.problems(out) == [] == manifest.problems(out / "checkpoint-3")
    train(interrupted())
    assert "this run is complete" in capsys.readouterr().out


def test_another_runs_folder_is_refused_with_a_diff(interrupted, tmp_path):
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    for change, line in [
        ({"learning_rate": 0.5}, "checkpoint-3 is of another run: --learning_rate was 0.001, is 0.5;"),
        ({"max_steps": 4, "seed": 3}, "is of another run: --max_steps was 3, is 4; --seed was 42, is 3;"),
        ({"per_device_train_batch_size": 8, "global_batch": 8}, "rows_per_step was 16, is 8"),
        ({"data_path": tmp_path / "held.json"}, "is not what it was"),
    ]:
        with pytest.raises(ResumeError, match=line):
            train(interrupted(**change))
    with pytest.raises(ResumeError, match=r"--data_path: .*held.json is not what it was"):
        train(interrupted(resume=None, resume_from_checkpoint=True, data_path=tmp_path / "held.json"))
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    train(interrupted(max_steps=4, resume=None, resume_from_checkpoint=True))  # asked for by name: said, and done
    assert len(steps(tmp_path / "out")) == 4
    assert yaml.safe_load((tmp_path / "out" / "run-from-checkpoint-3.yaml").read_text())["max_steps"] == 4


def test_where_nothing_is_good_it_ends_and_says_why(interrupted, tmp_path):
    for step in (1, 2, 3):
        (tmp_path / "out" / f"checkpoint-{step}" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(ResumeError, match=r"no checkpoint is good \(checkpoint-3: scheduler.pt: 0 bytes, .*checkpoint-1"):
        train(interrupted())
    with pytest.raises(ResumeError, match=r"scheduler\.pt: 0 bytes"):
        train(interrupted(resume=None, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2", output_dir=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_folder_without_checkpoints_has_to_be_this_runs(arguments, tmp_path, capsys):
    train(arguments(resume="auto", save_strategy="no", max_steps=1))
    (tmp_path / "out" / manifest.FILE).unlink()  # killed before its end
    with pytest.raises(ResumeError, match=r"--learning_rate was 0\.001, is 0\.5"):
        train(arguments(resume="auto", max_steps=1, learning_rate=0.5))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "precious").write_text("kept")
    with pytest.raises(UserError, match="not empty, and no run of this command wrote to it"):
        train(arguments(resume="auto", output_dir=tmp_path / "foreign"))
    assert [file.name for file in (tmp_path / "foreign").iterdir()] == ["precious"]
    capsys.readouterr()
    train(arguments(resume="auto", save_strategy="no", max_steps=1))
    assert "no checkpoint yet, training starts from the beginning" in capsys.readouterr().out


class Stop:
    """Asked to stop in the step, or evaluation batch, with this number."""

    def __init__(self, when):
        self.when, self.asked, self.training = when, 0, False

    def install(self):
        pass

    def __bool__(self):
        self.asked += self.training
        return self.asked >= self.when


@pytest.mark.parametrize("when", [3, 4])  # in the last step; in the evaluation after it
def test_stopped_at_the_end_it_makes_up_for_the_evaluation_and_trains_no_more(arguments, tmp_path, monkeypatch, when):
    """The third and last step is within an epoch, and its evaluation decides which checkpoint is saved."""
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_steps": 3, "eval_strategy": "steps", "resume": "auto"}
    settings |= {"eval_path": tmp_path / "held.json", "load_best_model_at_end": True, "per_device_train_batch_size": 2}
    settings |= {"global_batch": 4, "lr_scheduler_type": "constant"}
    train(arguments(**settings, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(command, "StopRequest", lambda: Stop(when))
        with pytest.raises(Stopped, match="stopped after step 3; checkpoint-3 is saved"):
            train(arguments(**settings))
    assert not evaluations(tmp_path / "out" / "checkpoint-3")
    train(arguments(**settings))
    whole, resumed = (json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "out"))
    assert resumed["global_step"] == 3 and resumed["best_global_step"] == 3
    assert evaluations(tmp_path / "out")[0]["eval_loss"] == evaluations(tmp_path / "whole")[0]["eval_loss"]
    assert resumed["best_metric"] == whole["best_metric"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_damaged_best_checkpoint_is_not_saved_as_the_finished_model(arguments, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "max_steps": 1}
    load = ResumableTrainer._load_best_model

    def harm(trainer):
        weights = tmp_path / "out" / "checkpoint-1" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        load(trainer)

    monkeypatch.setattr(ResumableTrainer, "_load_best_model", harm)
    with pytest.raises(ResumeError, match=r"checkpoint-1, the best checkpoint: model.safetensors: its content has changed"):
        train(arguments(**settings, eval_path=tmp_path / "held.json", load_best_model_at_end=True))
    assert not (tmp_path / "out" / "model.safetensors").exists()
