"""Tests the training command.

Checks what it writes, logs and refuses, and that two processes equal one.
"""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.checkpoint.export import export
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.measures.forced import teacher_forced
from stanford_alpaca.losses.objectives import MODES
from stanford_alpaca.train import train
from tests.helpers import evaluations, steps
from tests.ranks import run_ranks


def test_a_run_writes_a_plain_model_and_logs_what_it_says(arguments, tmp_path, root):
    train(arguments(eval_path=tmp_path / "held.json", per_device_eval_batch_size=3))
    out = tmp_path / "out"
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {
        torch.float32
    }
    assert not list(out.rglob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (out / "generation_config.json").exists()
    for entry in steps(out):
        assert {"loss", "nll", "emo", "target_prob", "grad_norm", "learning_rate"} <= entry.keys()
        assert entry["loss"] == pytest.approx(entry["nll"], rel=1e-5)
    assert "supervised_tokens_per_s" in steps(out)[-1]
    results = json.loads((out / "train_results.json").read_text())
    assert results["train_supervised_tokens_per_s"] > 0 and results["train_peak_memory_mib"] > 50

    # Evaluation divides sums over the whole set, so an independent pass in other batches gives the
    # same numbers.
    from stanford_alpaca.data.formats import load_records

    base = AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base")
    examples, _ = tokenize_records(
        load_records(tmp_path / "held.json", str(tmp_path / "cache")), tokenizer, 512
    )
    want = teacher_forced(
        model, tokenizer, examples, CostEmbedding(base.lm_head.weight), batch_size=5
    ).measures()
    got = json.loads((out / "eval_results.json").read_text())
    for name in ("nll", "emo", "perplexity"):
        assert got[f"eval_{name}"] == pytest.approx(want[name].value, rel=1e-4)


def test_every_mode_raises_the_probability_of_the_targets(arguments, tmp_path):
    for mode in MODES:
        train(
            arguments(
                mode=mode,
                output_dir=tmp_path / mode,
                max_steps=3,
                per_device_train_batch_size=8,
                global_batch=8,
            )
        )
        log = steps(tmp_path / mode)
        assert log[-1]["target_prob"] > log[0]["target_prob"] + 0.02, mode
        assert ("emo" in log[0]) == (mode in ("emo", "emo2", "emd", "mix"))


def test_accumulation_does_not_change_a_step(arguments, tmp_path):
    train(arguments(output_dir=tmp_path / "a", per_device_train_batch_size=16))
    train(arguments(output_dir=tmp_path / "b", per_device_train_batch_size=2))
    for one, two in zip(steps(tmp_path / "a"), steps(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])  # tests/exactness runs all engines
def test_two_processes_equal_one_step_by_step(arguments, tmp_path, engine):
    """Both runs have the same global batch, with 37 examples in steps of 16 and 11 to evaluate.

    Neither set fills its last batch, so both are filled up with masked rows.
    """
    data = tmp_path / "37.json"
    data.write_text(json.dumps(json.loads((tmp_path / "train.json").read_text())[:37]))
    settings = {"data_path": data, "eval_path": tmp_path / "held.json", "max_steps": 5}
    train(arguments(output_dir=tmp_path / "one", **settings))
    # fewer prompts than ranks
    (tmp_path / "prompts.txt").write_text("What is another word for big?\n")
    sampling = {
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_steps": 2,
        "sample_max_new_tokens": 5,
    }
    # Sampling changes nothing.
    argv = arguments(engine=engine, output_dir=tmp_path / "two", **settings, **sampling)
    run_ranks(2, train, argv)
    assert (
        yaml.safe_load((tmp_path / "two" / "run.yaml").read_text())["made_with"]["processes"] == 2
    )
    samples = [
        json.loads(line) for line in (tmp_path / "two" / "samples.jsonl").read_text().splitlines()
    ]
    first = [0] if engine == "fsdp" else []  # ZeRO-3 gathers no weights before its first step
    assert [sample["step"] for sample in samples] == [*first, 2, 4, 5]
    assert len(steps(tmp_path / "one")) == 5
    for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)
    assert evaluations(tmp_path / "one")[-1]["eval_emo"] == pytest.approx(
        evaluations(tmp_path / "two")[-1]["eval_emo"], rel=1e-4
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_in_bf16_with_a_tied_head_it_resumes_and_saves_float32_plainly(
    arguments, tmp_path, root, engine
):
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=2048,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(tmp_path / "gpt2")
    settings = {
        "model_name_or_path": tmp_path / "gpt2",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": True,
    }
    run_ranks(2, train, arguments(engine=engine, **settings))
    whole = steps(tmp_path / "out")
    for entry in whole:  # the loss is not rounded to bfloat16 on its way out of the model
        assert entry["loss"] == pytest.approx(entry["nll"], rel=1e-5)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in weights  # tied to the embedding, so written once
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # The master weights are saved, not a rounded copy.
    assert any((tensor != tensor.bfloat16()).any() for tensor in weights.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    export(tmp_path / "out" / "checkpoint-4", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == weights.keys() and all(
        torch.equal(exported[name], weights[name]) for name in weights
    )
    resume = {
        "resume_from_checkpoint": tmp_path / "out" / "checkpoint-2",
        "output_dir": tmp_path / "again",
    }
    run_ranks(2, train, arguments(engine=engine, **settings | resume))
    again = steps(tmp_path / "again")
    assert [entry["step"] for entry in again] == [1, 2, 3, 4]
    for one, two in zip(whole, again, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_a_cost_from_a_file_is_used(arguments, tmp_path, root):
    from safetensors.torch import save_file

    # An identity matrix as embedding gives the identity cost.
    save_file({"cost": torch.eye(2048)}, tmp_path / "cost.safetensors")
    train(arguments(output_dir=tmp_path / "file", cost=tmp_path / "cost.safetensors"))
    train(arguments(output_dir=tmp_path / "kind", cost_kind="identity"))
    for one, two in zip(steps(tmp_path / "file"), steps(tmp_path / "kind"), strict=True):
        assert one["emo"] == pytest.approx(two["emo"], rel=1e-4)
        assert one["emo"] == pytest.approx(1 - one["target_prob"], rel=1e-4)


def test_a_cost_from_another_model_and_its_kinds(arguments, tmp_path, root, capsys):
    """The base itself, with its rows in another order, prices as a frozen cost does."""
    base = root / "data" / "tiny-base"
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    priced = tmp_path / "pricing"
    model.save_pretrained(priced)
    AutoTokenizer.from_pretrained(base).save_pretrained(priced)
    emo = {}
    for name, changes in {
        "frozen": {},
        "same": {"cost": base},
        "other": {"cost": priced},
        "centred": {"cost_kind": "centred"},
        "shuffled": {"cost_kind": "shuffled"},
        "again": {"cost_kind": "shuffled", "cost_seed": 1},
    }.items():
        train(arguments(output_dir=tmp_path / name, max_steps=1, **changes))
        emo[name] = steps(tmp_path / name)[0]["emo"]
    assert emo["same"] == pytest.approx(emo["frozen"], rel=1e-6)
    assert len({round(value, 5) for value in emo.values()}) == 5
    assert "frozen shuffled costs" in capsys.readouterr().out
    record = yaml.safe_load((tmp_path / "again" / "run.yaml").read_text())
    assert (record["cost_kind"], record["cost_seed"]) == ("shuffled", 1)
    assert "frozen, shuffled (seed 1)" in (tmp_path / "again" / "README.md").read_text()
    card = (tmp_path / "other" / "README.md").read_text()
    assert "| cost | pricing, cosine |" in card and str(tmp_path) not in card
    identity = yaml.safe_load((tmp_path / "other" / "run.yaml").read_text())["made_with"]["cost"]
    same = yaml.safe_load((tmp_path / "same" / "run.yaml").read_text())["made_with"]["cost"]
    assert identity.startswith("sha256:") and identity != same
    backend = json.loads((priced / "tokenizer.json").read_text())
    vocab = backend["model"]["vocab"]
    one, two = list(vocab)[300:302]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (priced / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(UserError, match=r"has other ids than that of .*cost build --head"):
        train(arguments(output_dir=tmp_path / "wrong", cost=priced))


def test_the_command_exits_with_status_2_and_one_line(root, tmp_path):
    command = [
        sys.executable,
        "-m",
        "stanford_alpaca.train",
        "--model_name_or_path",
        "x",
        "--data_path",
        "y",
        "--mode",
        "emoo",
    ]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "--mode" in line and "emo2" in line
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
