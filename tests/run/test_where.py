"""What is chosen where nobody says it: processes, engine, precision, resuming, the recipe."""

import shlex
import subprocess
import sys

import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.run.where import PUBLISHED, Devices, in_bash, where_to_run

CPU, ONE, FOUR = Devices(0, False, 8), Devices(1, True, 8), Devices(4, True, 64)
FLAGS = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]


def chosen(argv, devices=CPU, **environment):
    return where_to_run([*FLAGS, *argv], environment, devices)


@pytest.mark.parametrize(
    ("devices", "environment", "processes", "engine"),
    [
        (CPU, {}, 1, "none"),
        (CPU, {"NPROC": "2"}, 2, "ddp"),
        (ONE, {}, 1, "none"),
        (FOUR, {}, 4, "fsdp"),
        (FOUR, {"NPROC": "1"}, 1, "none"),
        (FOUR, {"ENGINE": "zero2"}, 4, "zero2"),
        (CPU, {"ENGINE": "fsdp"}, 1, "fsdp"),
    ],
)
def test_processes_and_engine(devices, environment, processes, engine):
    found = chosen([], devices, **environment)
    assert found.processes == processes and found.value("engine") == engine
    assert found.launched == (engine != "none")
    assert (found.value("bf16") == "True") == devices.bf16 and found.value("resume") == "auto"


def test_what_is_said_stays(tmp_path):
    (tmp_path / "run.yaml").write_text("engine: zero3\nbf16: false\nresume_from_checkpoint: c\n")
    said = ["--engine=zero3", "--bf16", "False", "--resume_from_checkpoint", "c"]
    for argv in (said, ["--config", str(tmp_path / "run.yaml")]):
        found = chosen(argv, FOUR)
        assert found.flags == [*FLAGS, *argv] and found.launched
        assert found.value("engine") == "zero3" and found.value("resume") == ""


@pytest.mark.parametrize(
    ("argv", "launched"),
    [
        (["--engine", "none"], False),
        (["--engine=ddp"], True),
        (["--fsdp", "full_shard"], True),
        (["--deepspeed", "zero.json"], True),
    ],
)
def test_an_engine_that_is_given_decides_whether_ranks_are_launched(argv, launched):
    assert chosen(argv).launched == launched


def test_a_cpu_is_shared_and_keeps_memory():
    found = chosen([], CPU, NPROC="2", MALLOC_TRIM_THRESHOLD_="7")
    assert found.environment["OMP_NUM_THREADS"] == "4"
    assert found.environment["DS_ACCELERATOR"] == "cpu"
    assert "MALLOC_TRIM_THRESHOLD_" not in found.environment
    assert chosen([], FOUR).environment == {}
    hidden = chosen([], FOUR, NPROC="1", CUDA_VISIBLE_DEVICES="2,3").environment
    assert hidden == {"CUDA_VISIBLE_DEVICES": "2"}


def test_the_published_recipe_fills_in_what_is_not_given(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1.0e-5\nper_device_train_batch_size: 24\n")
    argv = [*FLAGS, "--config", str(tmp_path / "run.yaml")]
    found = where_to_run(argv, {"NPROC": "2"}, CPU, published=True)
    assert float(found.value("learning_rate")) == 1e-5
    assert found.value("lr_scheduler_type") == PUBLISHED["lr_scheduler_type"]
    assert found.value("global_batch") == "96"
    assert found.notes == ["global batch 96: 128 cannot be had from 2 processes of 24"]
    plain = where_to_run([*FLAGS, "--gradient_accumulation_steps", "3"], {}, CPU, published=True)
    assert plain.value("global_batch") == "" and plain.notes == []
    assert where_to_run(FLAGS, {}, CPU, published=True).value("global_batch") == "128"


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        ([], {"NPROC": "two"}, "NPROC=two: give a number of processes"),
        (["--fsdp", "True"], {"ENGINE": "ddp"}, "ENGINE=ddp and --engine, --fsdp"),
        (["--config", "none.yaml"], {}, "--config none.yaml: cannot be read"),
    ],
)
def test_refusals(argv, environment, message):
    with pytest.raises(UserError, match=message):
        chosen(argv, **environment)


def test_bash_gets_every_word_as_it_was():
    odd = ["--output_dir", "a b'c$(d)", "--run_name", "*"]
    lines = in_bash(where_to_run([*FLAGS[:4], *odd], {}, CPU))
    script = f'{lines}\nprintf "%s\\0" "$OUTPUT_DIR" "$NPROC" "${{FLAGS[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    assert words[:2] == ["a b'c$(d)", "1"]
    assert words[-8:] == [*FLAGS[:4], *odd] and "" not in words
    assert shlex.join(odd) in lines


def test_a_launcher_waits_for_torch_alone(tmp_path):
    (tmp_path / "run.yaml").write_text("mode: dft\n")
    code = (
        "import sys; from stanford_alpaca.run import where; "
        f"sys.argv[1:] = ['--', '--config', {str(tmp_path / 'run.yaml')!r}]; where.main(); "
        "assert not {'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "MODE=dft" in done.stdout, done.stderr
