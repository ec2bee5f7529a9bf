"""Tests environment variables that change numbers. They are refused, or recorded and compared."""

import os
import subprocess
import sys

import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.run.environment import check_environment, check_imports, recorded
from stanford_alpaca.run.parse import parse
from stanford_alpaca.run.record import changes, differences, made_with
from stanford_alpaca.train import run_or_stop


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "unset it, and give --bf16 or --fp16"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "unset it, and give --torch_compile"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "8",
            "unset it, and give --gradient_accumulation_steps",
        ),
        ("ACCELERATE_USE_FSDP", "true", "unset it, and give --fsdp"),
        ("FSDP_OFFLOAD_PARAMS", "true", "unset it, and give --fsdp and --fsdp_config"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "unset it, and give --deepspeed"),
        ("ACCELERATE_USE_CPU", "maybe", "unset it, and give --use_cpu"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "unset it"),
        ("ACCELERATE_SOMETHING_OF_A_LATER_VERSION", "1", "unset it"),
    ],
)
def test_what_a_flag_says_is_refused(name, value, advice, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError,
        match=f"^{name}={value} in the environment would change the training, and its record",
    ) as error:
        run_or_stop(None)
    assert str(error.value).endswith(f"would not say so; {advice}")


def test_what_launchers_set_is_taken():
    check_environment(
        {
            "ACCELERATE_MIXED_PRECISION": "no",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "default",
            "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
            "ACCELERATE_USE_CPU": "False",
            "ACCELERATE_CPU_AFFINITY": "0",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            "WORLD_SIZE": "2",
            "RANK": "1",
            "ACCELERATE_LOG_LEVEL": "INFO",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": "anywhere",
        }
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE=two in the environment is no number"),
        (
            "ACCELERATE_DEBUG_MODE",
            "maybe",
            "ACCELERATE_DEBUG_MODE=maybe in the environment: choose from 1, true",
        ),
        (
            "ACCELERATE_LOG_LEVEL",
            "loud",
            "ACCELERATE_LOG_LEVEL=loud in the environment: choose from debug",
        ),
    ],
)
def test_a_value_that_cannot_be_read_is_one_line(name, value, message):
    with pytest.raises(UserError, match=message):
        check_environment({name: value})


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "30", "soon"),
        ("HF_DATASETS_IN_MEMORY_MAX_SIZE", "0.5", "1e"),
        ("DS_ACCELERATOR", "cpu", "gpu"),
    ],
)
def test_what_a_library_cannot_be_imported_with_is_one_line(name, good, bad):
    check_imports({name: good})
    with pytest.raises(UserError, match=f"^{name}={bad} in the environment: give "):
        check_imports({name: bad})


def test_a_command_ends_in_one_line_before_it_imports_anything():
    command = [sys.executable, "-m", "stanford_alpaca.preview"]
    ended = subprocess.run(
        command, env={**os.environ, "HF_HUB_ETAG_TIMEOUT": "soon"}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "error: HF_HUB_ETAG_TIMEOUT=soon in the environment: give a whole number of seconds, "
        "or unset it\n"
    )


def test_what_numbers_depend_on_is_recorded_and_compared(arguments, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = parse(arguments())
    before = {"made_with": made_with(run)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert recorded().items() >= {"OMP_NUM_THREADS": "3", "NVIDIA_TF32_OVERRIDE": "1"}.items()
    now = {"made_with": made_with(run)}
    precision = "environment variable NVIDIA_TF32_OVERRIDE was not given, is 1"
    rounding = "environment variable OMP_NUM_THREADS was not given, is 3"
    assert changes(before, now) == ([precision], [], [rounding])
    run.made_with.update(before["made_with"])
    assert "made with environment variable OMP_NUM_THREADS not given, now 3" in differences(
        run, now["made_with"]
    )


def test_a_launcher_may_say_what_there_is_nothing_else_than(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    check_environment({"ACCELERATE_USE_CPU": "True"})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(
        UserError, match="ACCELERATE_USE_CPU=True in the environment would change the training"
    ):
        check_environment({"ACCELERATE_USE_CPU": "True"})


@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"]
)
def test_a_number_of_a_launcher_that_is_none_is_one_line(name):
    with pytest.raises(UserError, match=f"^{name}=abc in the environment is no number"):
        check_environment({name: "abc"})
