"""Tests the preflight's table, its advice, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest
from transformers import Gemma3Config

from benchmarks.traffic import Traffic
from stanford_alpaca.distributed.engine import ENGINES
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.preflight import plans
from stanford_alpaca.preflight.__main__ import Options, count_data, main, steps_of
from stanford_alpaca.preflight.estimate import Setup, peak_memory, traffic
from stanford_alpaca.preflight.model_profile import profile_model
from stanford_alpaca.preflight.plans import GIB, Machine, advise, batches_of, recommend, rows_of
from stanford_alpaca.train import train
from tests.ranks import run_ranks

MACHINE = Machine(gpu="A100", gpu_gib=80, mfu=0.5, link_gb_s=100, host_gb_s=10)


def command(argv: list[str]) -> None:
    """Runs the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["preflight", *argv])
        main()


@pytest.fixture
def folder(make_model, tmp_path):
    # Only the configuration is saved, no weights.
    make_model("llama", positions=1024).config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def table(make_model):
    """Makes the rows of a tiny LLaMA on GPUs with the given number of bytes."""
    config = make_model("llama").config
    profiles = {name: profile_model(config, 32, name) for name in ("autocast", "bfloat16")}

    def rows(gpu_bytes: float, engines=("ddp", "fsdp", "zero2"), sharding="replicate"):
        machine = replace(MACHINE, gpu_gib=gpu_bytes / plans.USABLE / GIB)
        return lambda setup: rows_of(profiles, setup, machine, 32.0, engines, sharding)

    return rows


SETUP = Setup(ranks=4, batch=8, accumulation=2, length=32, priced=True, cost_cache_mib=0)


def test_seconds_of_a_step_by_the_stated_rates():
    low, high = MACHINE.seconds(156e12, 200e9, 5e9)
    assert (low, high) == (2.5, 3.5)


def test_what_fits_is_what_is_below_the_line(table):
    totals = sorted(row.memory.total for row in table(1e12)(SETUP))
    assert [row.fits for row in table(1e12)(SETUP)] == [True] * 3
    middle = table(totals[1])(SETUP)
    assert sorted(row.memory.total for row in middle if row.fits) == totals[:2]
    for row in middle:
        assert row.fits == (row.largest_batch >= 8)
        assert 16 % max(row.largest_batch, 1) == 0


def test_the_largest_batch_divides_the_global_one(table):
    assert [(tried.batch, tried.accumulation) for tried in batches_of(SETUP)] == [
        (1, 16),
        (2, 8),
        (4, 4),
        (8, 2),
        (16, 1),
    ]
    assert {row.largest_batch for row in table(1e12)(SETUP)} == {16}
    assert {row.largest_batch for row in table(1.0)(SETUP)} == {0}


def test_the_simplest_of_what_is_nearly_as_fast(table):
    rows = table(1e12)(SETUP)
    times = dict(zip(("ddp", "fsdp", "zero2"), ((1, 1.3), (1, 1.19), (1, 1.0)), strict=True))
    assert recommend([replace(row, seconds=times[row.engine]) for row in rows]).engine == "fsdp"
    assert (
        recommend(
            [replace(row, seconds=times[row.engine], fits=row.engine == "ddp") for row in rows]
        ).engine
        == "ddp"
    )
    assert recommend([replace(row, fits=False) for row in rows]) is None


def test_advice_takes_what_fits_and_then_what_saves_memory(table):
    assert advise(table(1e12), SETUP).startswith(
        "ENGINE=ddp --per_device_train_batch_size 8 --cost_sharding replicate: the simpl"
    )
    needs = {row.engine: row.memory.total for row in table(1e12)(SETUP)}
    smallest = min(needs, key=needs.__getitem__)
    assert advise(table(needs[smallest]), SETUP).startswith(
        f"ENGINE={smallest} --per_device_train_batch_size 8"
    )
    again = advise(table(needs[smallest] * 0.9), SETUP)
    assert (
        "--per_device_train_batch_size 8" in again
        and "--activation_checkpointing: the simplest" in again
    )
    assert advise(table(1000.0), SETUP).startswith("nothing fits on 4 rank(s)")


def test_the_command_needs_a_configuration_and_no_weights(folder, capsys):
    command(
        (
            f"--model_name_or_path {folder} --nproc 4 --mode emo --model_max_length 64 --examples "
            "1000 --gpu H100"
        ).split()
    )
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    # with the cost shardings replicate, shard and vocab_parallel
    assert [line.split()[1] for line in lines[1:]].count("fsdp") == 3
    assert (
        "4 rank(s), 4 x 8 rows" in printed
        and "40% of 989 TFLOP/s, 200 GB/s a rank within a node" in printed
    )
    assert "\n24 steps\n" in printed and printed.splitlines()[-1].startswith(
        "ENGINE=ddp --per_device_train_batch_size 4 "
    )


def test_json_has_every_engine_and_bytes(folder, capsys):
    command(
        f"--model_name_or_path {folder} --nproc 2 --mode emo --model_max_length 64 --json".split()
    )
    read = json.loads(capsys.readouterr().out)
    assert {row["engine"] for row in read["rows"]} == set(ENGINES) - {"none"}
    ddp = read["rows"][0]["memory"]
    assert ddp["weights"] == 4 * read["parameters"]["total"]
    assert ddp["total"] == sum(value for name, value in ddp.items() if name != "total")


def test_a_thousand_ranks(folder, capsys):
    flags = f"--model_name_or_path {folder} --nproc 8 --nodes 128 --mode emo --model_max_length 64"
    command(f"{flags} --json".split())
    read = json.loads(capsys.readouterr().out)
    # The ranks' 4096 rows are more than the default global batch of 128.
    assert read["setup"]["ranks"] == 1024 and read["setup"]["accumulation"] == 1
    fsdp = next(
        row for row in read["rows"] if (row["engine"], row["cost_sharding"]) == ("fsdp", "shard")
    )
    assert fsdp["memory"]["weights"] == 4 * read["parameters"]["total"] / 1024
    command(flags.split())
    assert "25 GB/s a rank between nodes" in capsys.readouterr().out


def test_steps():
    options = Options("m", examples=1000, mean_tokens=128, num_train_epochs=3)
    setup = Setup(ranks=4, batch=4, accumulation=8, length=512, priced=False)
    assert steps_of(options, setup) == 24
    # 250 full rows take two steps an epoch.
    assert steps_of(replace(options, packing=True), setup) == 6
    assert steps_of(Options("m"), setup) is None


def test_data_is_counted_as_training_counts_it(root, tmp_path):
    rows = [
        {"instruction": "Add.", "output": "three"},
        {"instruction": "Talk.", "output": "word " * 60},
        {"instruction": "Nothing.", "output": ""},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    options = Options(
        f"{root}/data/tiny-base", data_path=f"{tmp_path}/data.json", cache_dir=str(tmp_path)
    )
    counted = count_data(options)
    assert counted.examples == 2 and 0.3 < counted.supervised_share < 0.9
    assert counted.mean_tokens > count_data(replace(options, model_max_length=64)).mean_tokens


def test_activation_checkpointing_and_no_costs_save_memory(make_model):
    profile = profile_model(make_model("llama").config, 32, "bfloat16")
    with_costs = peak_memory(profile, SETUP, "zero2", "replicate").total
    assert (
        peak_memory(profile, replace(SETUP, checkpointing=True), "zero2", "replicate").total
        < with_costs
    )
    assert peak_memory(profile, replace(SETUP, priced=False), "zero2", "-").total < with_costs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nproc 0", "--nproc 0: give a whole number from 1 on"),
        ("--nproc 2.5", "--nproc 2.5: give a whole number from 1 on"),
        ("--gpu_gib nan", "--gpu_gib nan: give a number from 1e-06 on"),
        ("--gpu_gib much", "--gpu_gib much: give a number from 1e-06 on"),
        ("--packing perhaps", "--packing perhaps: give True, False, or the flag alone"),
        ("--engine zero4", "--engine zero4: choose from none, ddp, fsdp"),
        ("--gpu V100", "--gpu V100: choose from B200, H200"),
        ("--mode enmo", "--mode enmo: choose from .*; did you mean emo"),
        ("--ngpu 4", "unknown argument --ngpu"),
        ("--nproc 4 --engine none", "--engine none with 4 rank.s.: choose from ddp, fsdp"),
        ("--nproc 4 --global_batch 100", "--global_batch 100 is no multiple of 16 .4 ranks of 4."),
        (
            "--nproc 4 --mode emo --engine ddp --cost_sharding vocab_parallel",
            "vocab_parallel also engine fsdp",
        ),
        ("--nproc 4 --cost_sharding shard", "shard a --mode with costs"),
        (
            "--model_max_length 4096",
            "--model_max_length 4096 is more than the model's 1024 positions",
        ),
        ("--mean_tokens 600", "--mean_tokens 600 is more than --model_max_length 512"),
        ("--supervised_share 40", "--supervised_share 40: give a number from 1e-06 to 1"),
        ("--data_path x.json --examples 3", "give one or the other"),
        ("--model_max_length 64 --data_path none.json", "transformers cannot load this folder"),
        ("--model_name_or_path ./none", "cannot load a model"),
    ],
)
def test_refusals_are_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        command(["--model_name_or_path", folder, *flags.split()])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert re.search(message, printed.err)


def test_a_model_with_other_senses_is_counted_whole_and_run_as_a_model_of_text():
    image = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    }
    nested = Gemma3Config(
        text_config=text, vision_config=image | {"patch_size": 14}, mm_tokens_per_image=4
    )
    found, alone = (
        profile_model(config, 32, "bfloat16") for config in (nested, nested.text_config)
    )
    assert found.activations == alone.activations
    assert (
        found.parameters.total > alone.parameters.total
        and found.parameters.layer == alone.parameters.layer
    )


def bytes_of(argv: list[str]) -> int:
    with Traffic() as counted:
        train(argv)
    return counted.total


def test_ranks_send_what_was_estimated(root, tmp_path, arguments):
    """Measures the bytes that a second step adds.

    They are the gathers of two micro-batches, one reduction, and eight bytes that count the
    targets.
    """
    steps = [
        arguments(
            "--fsdp",
            max_steps=number,
            global_batch=None,
            gradient_accumulation_steps=2,
            cost_sharding="shard",
            output_dir=tmp_path / f"out{number}",
        )
        for number in (1, 2)
    ]
    one, two = (run_ranks(2, bytes_of, argv)[0] for argv in steps)
    counts = profile_model(
        ModelSource(str(root / "data" / "tiny-base")).config(), 16, "float32"
    ).parameters
    setup = Setup(
        ranks=2, batch=4, accumulation=2, length=16, priced=True, bf16=False, device="cpu"
    )
    assert two - one == pytest.approx(traffic(counts, setup, "fsdp", "shard"), rel=1e-4)
