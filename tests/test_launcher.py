"""Tests train_emo.sh: where it runs, what it chooses, and what it refuses."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml


@pytest.fixture
def launch(root, tmp_path):
    """Runs the launcher from a folder, with 40 shipped examples as data.

    Returns the finished process.
    """
    records = json.loads((root / "data" / "instructions" / "train.json").read_text())[:40]
    (tmp_path / "data.json").write_text(json.dumps(records))

    def run(*arguments, cwd=root, script="train_emo.sh", **environment):
        env = os.environ | {
            "PYTHON": sys.executable,
            "DATA_PATH": str(tmp_path / "data.json"),
            "OUTPUT_DIR": str(tmp_path / "out"),
        }
        done = subprocess.run(
            ["bash", script, *map(str, arguments)],
            cwd=cwd,
            env=env | environment,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done

    return run


def test_the_real_form_with_the_published_recipe(launch, tmp_path):
    done = launch("data/tiny-base", "emo", "--max_steps", 1)
    assert done.returncode == 0, done.stderr
    assert "128 examples a step: 4 on each of 1 process(es), 32 micro-batch(es)" in done.stdout
    assert f"checkpoint: {tmp_path / 'out'}" in done.stdout
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 4
    assert (
        f"report: {tmp_path / 'out' / 'report.html'}" in done.stdout
        and "the page has the curves alone" in done.stdout
    )
    again = launch("data/tiny-base", "emo", "--max_steps", 1, REPORT="no")
    assert again.returncode == 0 and "this run is complete" in again.stdout
    other = launch("data/tiny-base", "emo", "--max_steps", 2)
    assert (
        other.returncode == 3
        and "--max_steps was 1, is 2" in other.stderr
        and "checkpoint:" not in other.stdout
    )


def test_from_inside_the_package_folder_with_two_processes_and_an_inexact_batch(launch, root):
    arguments = ("../data/tiny-base", "dft", "--max_steps", 1, "--per_device_train_batch_size", 24)
    done = launch(
        *arguments, cwd=root / "stanford_alpaca", NPROC="2", OMP_NUM_THREADS="1", REPORT="no"
    )
    assert done.returncode == 0, done.stderr
    assert "global batch 96: 128 cannot be had from 2 processes of 24" in done.stdout
    assert "96 examples a step: 24 on each of 2 process(es), 2 micro-batch(es)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            ("data/tiny-base", "emo", "--deepspeed", "x"),
            {"ENGINE": "fsdp"},
            "ENGINE=fsdp and --engine, --fsdp or",
        ),
        (("data/tiny-base", "emo"), {"NPROC": "two"}, "NPROC=two"),
        (
            ("data/tiny-base", "emo", "--per-device-train-batch-size", "x"),
            {},
            "--per_device_train_batch_size x",
        ),
        (("--max_steps", "5"), {}, "give MODEL_PATH first"),
        (("data/tiny-base", "emo", "--learning_rate", "-1"), {"NPROC": "2"}, "--learning_rate -1"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(launch, tmp_path, arguments, environment, message):
    done = launch(*arguments, **environment)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_help_is_the_header(launch):
    done = launch("--help")
    assert done.returncode == 0
    assert (
        "bash train_emo.sh MODEL_PATH [MODE] [train flags]" in done.stdout
        and "OUTPUT_DIR" in done.stdout
    )


def test_a_recipe_in_a_file(launch, root, tmp_path):
    """The file's values win over the published recipe, the command line's over the file's."""
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {root}/data/tiny-base\nmode: dft\nglobal_batch: 8\nmax_steps: 5\n"
        "learning_rate: 1.0e-3\n"
    )
    done = launch("--config", tmp_path / "run.yaml", "--max_steps", 1, REPORT="no")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint: {tmp_path / 'out'}" in done.stdout
    record = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    given = {name: record[name] for name in ("mode", "global_batch", "max_steps", "learning_rate")}
    assert given == {"mode": "dft", "global_batch": 8, "max_steps": 1, "learning_rate": 1e-3}
    assert record["lr_scheduler_type"] == "cosine" and record["resume"] == "auto"


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["--output_dir", "my run"], "my run"),
        (["--output_dir=one"], "one"),
        (["--output-dir", "one", "--output_dir", "two"], "two"),
        (["--output_dir", "~/one"], "HOME/one"),
        (["--config", "run.yaml"], "of-config"),
    ],
)
def test_all_that_is_said_names_the_output_folder_that_is_given(root, tmp_path, given, folder):
    """Nothing is trained: an interpreter that runs only the choice of flags stands in."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\ncase "$*" in *stanford_alpaca.train*|*evaluation.report*) '
        f'printf \'[%s] \' "$@"; echo ;; *) exec {shlex.quote(sys.executable)} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / "run.yaml").write_text("output_dir: of-config\nmode: emo\n")
    environment = os.environ | {"PYTHON": str(python), "NPROC": "1", "HOME": str(tmp_path)}
    environment = {name: environment[name] for name in environment.keys() - {"OUTPUT_DIR"}}
    model = [] if "--config" in given else ["model", "emo"]
    done = subprocess.run(
        ["bash", str(root / "train_emo.sh"), *model, *given],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    folder = folder.replace("HOME", str(tmp_path))
    trained, report, checkpoint, talk = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "stanford_alpaca.train]" in trained and f"[{folder}/report.html]" in report
    assert checkpoint == f"checkpoint: {folder}"
    assert shlex.split(talk)[-2] == folder


def test_the_flag_of_the_output_folder_wins_over_the_environment(root, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\ncase "$*" in *stanford_alpaca.train*|*evaluation.report*) '
        f'printf \'[%s] \' "$@"; echo ;; *) exec {shlex.quote(sys.executable)} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "NPROC": "1", "OUTPUT_DIR": "elsewhere"}
    done = subprocess.run(
        ["bash", str(root / "train_emo.sh"), "model", "emo", "--output_dir", "one"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "elsewhere" not in done.stdout and "checkpoint: one\n" in done.stdout
