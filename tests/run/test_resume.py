"""Tests where a run starts.

Checks what counts as the same run, which checkpoints are skipped, and when a run is complete.
"""

import json
import shutil
from hashlib import sha256

import pytest
import yaml

from stanford_alpaca import train as command
from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.run_file import read_run
from stanford_alpaca.errors import ResumeError, Stopped, UserError
from stanford_alpaca.run.arguments import FLAGS, defaults
from stanford_alpaca.run.parse import parse
from stanford_alpaca.run.record import (
    IRRELEVANT_FLAGS,
    NUMERICS_FLAGS,
    STATE_FLAGS,
    changes,
    made_with,
    write_run,
)
from stanford_alpaca.run.start import where_to_start
from stanford_alpaca.train import train
from stanford_alpaca.training.resumable_trainer import ResumableTrainer
from stanford_alpaca.training.trainer import EmoTrainer
from tests.helpers import evaluations, steps

RECORD = {
    "learning_rate": 1e-3,
    "data_path": ["a.json"],
    "engine": "ddp",
    "made_with": {"torch": "2", "model": "x", "data": {"a.json": "d"}},
}


MADE = RECORD["made_with"]
STREAM, BEST = {"streaming": True}, {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("change", "flags", "contents", "rounding"),
    [
        ({"learning_rate": 1e-4}, ["--learning_rate was 0.001, is 0.0001"], [], []),
        ({"learning_rate": None}, ["--learning_rate was 0.001, is not given"], [], []),
        ({"lora": True}, [], ["--lora was False, is True"], []),
        ({"seed": 1}, [], ["--seed was 42, is 1"], []),
        # the defaults, given explicitly
        ({"lora": False, "lr_scheduler_type": "linear"}, [], [], []),
        ({"engine": "fsdp"}, [], [], ["--engine was ddp, is fsdp"]),
        (
            {
                "logging_steps": 3,
                "output_dir": "elsewhere",
                "save_steps": 2,
                "dataloader_num_workers": 2,
            },
            [],
            [],
            [],
        ),
        ({"data_path": ["b.json"]}, [], ["--data_path was a.json, is b.json"], []),
        ({"made_with": MADE | {"torch": "3"}}, [], [], ["torch was 2, is 3"]),
        ({"made_with": MADE | {"model": "y"}}, [], ["the model has changed"], []),
        ({"made_with": MADE | {"rows_per_step": 8}}, ["rows_per_step was not given, is 8"], [], []),
        # the same data in another place
        (
            {"data_path": ["c.json"], "made_with": MADE | {"data": {"c.json": "d"}}},
            [],
            [],
            [],
        ),
        (
            {"made_with": MADE | {"content of --deepspeed": "x"}},
            [],
            [],
            ["the content of --deepspeed has changed"],
        ),
    ],
)
def test_what_makes_another_run_of_it(change, flags, contents, rounding):
    assert changes(RECORD, RECORD | change) == (flags, contents, rounding)
    assert changes(json.loads(json.dumps(RECORD)), RECORD) == ([], [], [])


@pytest.mark.parametrize(
    ("common", "change", "flags", "contents"),
    [
        (
            BEST,
            {"metric_for_best_model": "emo"},
            [],
            ["--metric_for_best_model was not given, is emo"],
        ),
        (STREAM, {"dataloader_num_workers": 2}, ["--dataloader_num_workers was 0, is 2"], []),
        (BEST, {"save_steps": 2}, ["--save_steps was 500, is 2"], []),
        (BEST, {"eval_path": ["b.json"]}, [], ["--eval_path was not given, is b.json"]),
        ({}, {"save_strategy": "best"}, ["--save_strategy was steps, is best"], []),
        (
            {"made_with": MADE | {"content of --deepspeed": "x"}},
            {"made_with": MADE | {"content of --deepspeed": "y"}},
            [],
            ["the content of --deepspeed has changed"],
        ),
    ],
)
def test_what_decides_the_result_because_of_others(common, change, flags, contents):
    assert changes(RECORD | common, RECORD | common | change) == (flags, contents, [])


def test_every_flag_that_may_change_is_one():
    assert set(defaults(*FLAGS)) >= IRRELEVANT_FLAGS | NUMERICS_FLAGS | (
        STATE_FLAGS - {"lora_target_parameters"}
    )
    assert not IRRELEVANT_FLAGS & NUMERICS_FLAGS and not STATE_FLAGS & (
        IRRELEVANT_FLAGS | NUMERICS_FLAGS
    )


def test_what_a_file_of_settings_holds_is_in_the_record(arguments, tmp_path):
    (tmp_path / "settings.json").write_text('{"split_batches": false}')
    run = parse(arguments(accelerator_config=tmp_path / "settings.json"))
    first = made_with(run)["content of --accelerator_config"]
    assert first == "sha256:" + sha256(b'{"split_batches": false}').hexdigest()
    (tmp_path / "settings.json").write_text('{"even_batches": true}')
    assert made_with(run)["content of --accelerator_config"] != first


@pytest.fixture
def interrupted(arguments, tmp_path):
    """A run of three steps with a checkpoint of each, as if killed at the end.

    Its output folder has no model. Returns a function that makes its argv with changes.
    """
    settings = {"save_strategy": "steps", "save_steps": 1, "resume": "auto"}
    train(arguments(**settings))
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in (manifest.MANIFEST_FILE, "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    return lambda **changes: arguments(**settings | changes)


def test_it_goes_on_from_the_newest_good_one_and_says_what_it_passed_over(
    interrupted, tmp_path, capsys
):
    out = tmp_path / "out"
    weights = (out / "checkpoint-3" / "optimizer.pt").read_bytes()
    (out / "checkpoint-3" / "optimizer.pt").write_bytes(weights[:-1] + b"x")
    (out / "checkpoint-2" / "rng_state.pth").unlink()
    train(interrupted())
    said = capsys.readouterr().out
    assert "passed over checkpoint-3: optimizer.pt: its content has changed" in said
    assert (
        "passed over checkpoint-2: rng_state.pth: not there" in said
        and f"going on from {out / 'checkpoint-1'}" in said
    )
    assert [entry["loss"] for entry in steps(out)] == [
        entry["loss"] for entry in steps(tmp_path / "whole")
    ]
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert manifest.problems(out) == [] == manifest.problems(out / "checkpoint-3")
    train(interrupted())
    assert "this run is complete" in capsys.readouterr().out


def test_another_runs_folder_is_refused_with_a_diff(interrupted, tmp_path):
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    for change, line in [
        (
            {"learning_rate": 0.5},
            "checkpoint-3 is of another run: --learning_rate was 0.001, is 0.5;",
        ),
        (
            {"max_steps": 4, "seed": 3},
            "is of another run: --max_steps was 3, is 4; --seed was 42, is 3;",
        ),
        ({"per_device_train_batch_size": 8, "global_batch": 8}, "rows_per_step was 16, is 8"),
        ({"data_path": tmp_path / "held.json"}, r"--data_path was .*train.json, is .*held.json"),
    ]:
        with pytest.raises(ResumeError, match=line):
            train(interrupted(**change))
    with pytest.raises(ResumeError, match=r"--data_path was .*train.json, is .*held.json"):
        train(
            interrupted(resume=None, resume_from_checkpoint=True, data_path=tmp_path / "held.json")
        )
    assert before == {
        file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()
    }
    # with --resume_from_checkpoint, changes are printed and accepted
    asked = {"resume": None, "resume_from_checkpoint": True}
    named = {"resume": None, "resume_from_checkpoint": tmp_path / "out" / "checkpoint-3"}
    for change, line in [
        ({"per_device_train_batch_size": 8, "global_batch": 8}, "rows_per_step was 16, is 8"),
        ({"seed": 3}, "--seed was 42, is 3"),  # changes the order of the examples
        ({"optim": "adafactor"}, "--optim was adamw_torch_fused, is adafactor"),
        ({"lora": True}, "--lora was False, is True"),
    ]:
        with pytest.raises(
            ResumeError,
            match=f"checkpoint-3 is of another run: {line}; give the same command to go on",
        ):
            where_to_start(parse(interrupted(**named, **change)))
    train(interrupted(max_steps=4, **asked))
    assert len(steps(tmp_path / "out")) == 4
    assert (
        yaml.safe_load((tmp_path / "out" / "run-from-checkpoint-3.yaml").read_text())["max_steps"]
        == 4
    )


def test_where_nothing_is_good_it_ends_and_says_why(interrupted, tmp_path):
    for step in (1, 2, 3):
        (tmp_path / "out" / f"checkpoint-{step}" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(
        ResumeError,
        match=r"no checkpoint is good \(checkpoint-3: scheduler.pt: 0 bytes, .*checkpoint-1",
    ):
        train(interrupted())
    with pytest.raises(ResumeError, match=r"scheduler\.pt: 0 bytes"):
        train(
            interrupted(
                resume=None,
                resume_from_checkpoint=tmp_path / "out" / "checkpoint-2",
                output_dir=tmp_path / "new",
            )
        )
    assert not (tmp_path / "new").exists()


def test_a_folder_without_checkpoints_has_to_be_this_runs(arguments, tmp_path, capsys):
    train(arguments(resume="auto", save_strategy="no", max_steps=1))
    (tmp_path / "out" / manifest.MANIFEST_FILE).unlink()  # as if killed before its end
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
    """Requests a stop in the step, or evaluation batch, with this number."""

    def __init__(self, when):
        self.when, self.asked, self.training = when, 0, False

    def install(self):
        pass

    def __bool__(self):
        self.asked += self.training
        return self.asked >= self.when


@pytest.mark.parametrize("when", [3, 4])  # in the last step, or in the evaluation after it
def test_stopped_at_the_end_it_makes_up_for_the_evaluation_and_trains_no_more(
    arguments, tmp_path, monkeypatch, when
):
    """The third and last step lies within an epoch.

    Its evaluation decides which checkpoint is saved.
    """
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_steps": 3,
        "eval_strategy": "steps",
        "resume": "auto",
        "eval_path": tmp_path / "held.json",
        "load_best_model_at_end": True,
        "per_device_train_batch_size": 2,
        "global_batch": 4,
        "lr_scheduler_type": "constant",
    }
    train(arguments(**settings, output_dir=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(command, "StopRequest", lambda: Stop(when))
        with pytest.raises(Stopped, match="stopped after step 3; checkpoint-3 is saved"):
            train(arguments(**settings))
    assert not evaluations(tmp_path / "out" / "checkpoint-3")
    train(arguments(**settings))
    whole, resumed = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())
        for name in ("whole", "out")
    )
    assert resumed["global_step"] == 3 and resumed["best_global_step"] == 3
    assert (
        evaluations(tmp_path / "out")[0]["eval_loss"]
        == evaluations(tmp_path / "whole")[0]["eval_loss"]
    )
    assert resumed["best_metric"] == whole["best_metric"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_damaged_best_checkpoint_is_not_saved_as_the_finished_model(
    arguments, tmp_path, monkeypatch
):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "eval_strategy": "steps",
        "max_steps": 1,
    }
    load = ResumableTrainer._load_best_model

    def harm(trainer):
        weights = tmp_path / "out" / "checkpoint-1" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        load(trainer)

    monkeypatch.setattr(ResumableTrainer, "_load_best_model", harm)
    with pytest.raises(
        ResumeError,
        match=r"checkpoint-1, the best checkpoint: model.safetensors: its content has changed",
    ):
        train(arguments(**settings, eval_path=tmp_path / "held.json", load_best_model_at_end=True))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_finished_run_that_goes_on_and_is_killed_goes_on_again(
    arguments, tmp_path, monkeypatch, capsys
):
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    train(arguments(**more | {"max_steps": 2}))
    killed_at = [2, 3]  # before the resumed run's first checkpoint, and after it
    for resume, last in (
        ({"resume_from_checkpoint": True}, killed_at[0]),
        ({"resume": "auto"}, killed_at[1]),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(EmoTrainer, "training_step", killed_after(last))
            train(arguments(**more, **resume))
        assert manifest.checkpoints(tmp_path / "out")[0].name == f"checkpoint-{last}"
    train(arguments(**more, resume="auto"))
    assert "going on from" in capsys.readouterr().out and len(steps(tmp_path / "out")) == 4
    assert manifest.problems(tmp_path / "out") == []
    with pytest.raises(ResumeError, match="--max_steps was 4, is 2"):
        train(arguments(**more | {"max_steps": 2}, resume="auto"))


def killed_after(step):
    usual = EmoTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return usual(self, *args, **kwargs)

    return training_step


def test_a_finished_model_that_was_touched_is_not_trained_anew(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    for strategy in ("no", "steps"):
        train(
            arguments(output_dir=out / strategy, save_strategy=strategy, save_steps=1, max_steps=1)
        )
        with (out / strategy / "tokenizer_config.json").open("a") as file:
            file.write("\n")
    again = {"resume": "auto", "max_steps": 1}
    with pytest.raises(
        ResumeError, match=r"not what was saved \(tokenizer_config.json: .* bytes, not .*put right"
    ):
        train(arguments(**again, output_dir=out / "no"))
    assert (out / "no" / "tokenizer_config.json").read_text().endswith("\n")
    train(arguments(**again, output_dir=out / "steps", save_strategy="steps", save_steps=1))
    said = capsys.readouterr().out
    assert "made again, for tokenizer_config.json" in said and "going on from" in said
    assert manifest.problems(out / "steps") == []


def test_a_record_that_was_half_written_locks_nobody_out(arguments, tmp_path):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "run.yaml").write_text("")
    (out / "run.yaml.part").write_text("mode: e")
    start = where_to_start(parse(arguments(resume="auto")))
    assert (start.checkpoint, start.notes) == (None, [])
    write_run(parse(arguments(resume="auto")), start.record)
    assert read_run(out) == start.record and sorted(file.name for file in out.iterdir()) == [
        "run.yaml",
        "runs",
    ]


def sign(checkpoint, **changes):
    """Writes a manifest for the files as they are now.

    ``changes`` replace what it says about the run; None removes an entry.
    """
    about = (
        manifest.read(checkpoint) | {name: None for name in ("version", "files", "sum")} | changes
    )
    kept = {name: value for name, value in about.items() if value is not None}
    manifest.write(
        checkpoint, manifest.entries_of(checkpoint, manifest.list_saved(checkpoint)), kept
    )


def state(checkpoint, **changes):
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    sign(checkpoint)


def without(checkpoint, name):
    (checkpoint / name).unlink()
    sign(checkpoint)


def test_what_is_not_a_runs_under_a_manifest_that_fits_is_refused(interrupted, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-3"
    usual = tmp_path / "usual"
    shutil.copytree(checkpoint, usual)
    run = parse(
        interrupted(resume=None, resume_from_checkpoint=checkpoint, output_dir=tmp_path / "new")
    )
    record = manifest.read(checkpoint)["run"]
    assert where_to_start(run).checkpoint == str(checkpoint)
    for harm, message in [
        (lambda: sign(checkpoint, run=None), "is of another run: the model has changed"),
        (lambda: sign(checkpoint, run="mine"), "manifest.json: damaged"),
        (lambda: sign(checkpoint, run=record | {"made_with": []}), "the model has changed"),
        (lambda: sign(checkpoint, run=record | {"made_with": "x"}), "manifest.json: damaged"),
        (
            lambda: sign(checkpoint, run=record | {"made_with": {"data": ["x"]}}),
            "manifest.json: damaged",
        ),
        (lambda: sign(checkpoint, run=record | {"data_path": [["x"]]}), "manifest.json: damaged"),
        (lambda: sign(checkpoint, step=None), "manifest.json: cannot be read .KeyError"),
        (lambda: sign(checkpoint, world_size=None), "does not say how many processes"),
        (lambda: sign(checkpoint, world_size="2"), "manifest.json: damaged"),
        (lambda: without(checkpoint, "scheduler.pt"), "has no scheduler.pt"),
        (lambda: without(checkpoint, "rng_state.pth"), "has no rng_state.pth"),
        (
            lambda: state(checkpoint, global_step=2),
            "trainer_state.json: not what the Trainer writes at step 3",
        ),
        (lambda: state(checkpoint, log_history=7), "trainer_state.json: "),
        (lambda: state(checkpoint, log_history=[{}]), "trainer_state.json: cannot be read"),
        (lambda: state(checkpoint, best_model_checkpoint=7), "trainer_state.json: not what"),
        (lambda: state(checkpoint, train_batch_sizes=7), "trainer_state.json: cannot be read"),
    ]:
        harm()
        with pytest.raises(ResumeError, match=message):
            where_to_start(run)
        shutil.rmtree(checkpoint)
        shutil.copytree(usual, checkpoint)


def test_an_older_checkpoint_is_taken_up_in_another_folder(interrupted, tmp_path):
    older = {"resume": None, "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1"}
    with pytest.raises(
        UserError,
        match=r"has checkpoint-3, which is newer than .*checkpoint-1: give another --output_dir",
    ):
        train(interrupted(**older))
    train(interrupted(**older, output_dir=tmp_path / "other", max_steps=2))
    assert len(steps(tmp_path / "other")) == 2
