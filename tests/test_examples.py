"""Tests the examples.

In other libraries' Trainers they train the same as this package's command, and they leave a plain
model.
"""

import json
import re
import runpy
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca import attach_objective
from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.objective.attach import AttachedObjective
from stanford_alpaca.train import train
from tests.helpers import evaluations, steps

NEEDS_TRL = pytest.mark.skipif(
    find_spec("trl") is None, reason="trl is not installed: pip install trl==1.16.0"
)
EXAMPLES = ["hf_trainer", pytest.param("trl_sft", marks=NEEDS_TRL)]
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 11,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def run(root, tmp_path, arguments):
    """Runs an example on the files that ``arguments`` writes.

    The output goes to a folder with the given name.
    """

    def run(name, folder, **changes):
        main = runpy.run_path(str(root / "examples" / f"{name}.py"))["main"]
        files = {
            "data": tmp_path / "train.json",
            "eval_data": tmp_path / "held.json",
            "output_dir": tmp_path / folder,
        }
        main(
            **{key: str(file) for key, file in files.items()},
            **SETTINGS | {"bf16": False} | changes,
        )
        return tmp_path / folder

    return run


@pytest.fixture
def calls(monkeypatch):
    """Returns what the objective gets in each training call.

    A call has ids, labels and the count of targets.
    """
    seen, original = [], AttachedObjective._forward

    def spy(self, model, labels, *args, num_items_in_batch=None, **kwargs):
        if torch.is_grad_enabled():
            seen.append((kwargs["input_ids"], labels, num_items_in_batch))
        return original(self, model, labels, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    monkeypatch.setattr(AttachedObjective, "_forward", spy)
    return seen


def assert_same_runs(one, two):
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert evaluations(one)[-1]["eval_loss"] == pytest.approx(
        evaluations(two)[-1]["eval_loss"], abs=1e-5
    )


# The value of emo is nll, but its gradient is not. The value of mix is neither.
@pytest.mark.parametrize("mode", ["emo", "mix"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_steps_are_those_of_our_own_command(run, arguments, tmp_path, capsys, name, mode):
    folder = run(name, "theirs", mode=mode)
    printed = capsys.readouterr().out
    train(
        arguments(
            mode=mode,
            global_batch=8,
            eval_path=tmp_path / "held.json",
            per_device_eval_batch_size=11,
        )
    )
    assert_same_runs(folder, tmp_path / "out")
    final = evaluations(tmp_path / "out")[-1]
    tokens, nll, emo = re.search(
        r"(\d+) held-out tokens: nll ([\d.]+), emo ([\d.]+)", printed
    ).groups()
    assert f", {tokens} supervised;" in capsys.readouterr().out
    assert float(nll) == pytest.approx(final["eval_nll"], abs=1e-4)
    assert float(emo) == pytest.approx(final["eval_emo"], abs=1e-4)


@pytest.mark.parametrize("name", EXAMPLES)
def test_answers_are_trained_and_counted_over_the_whole_batch(run, root, tmp_path, calls, name):
    run(name, "out", max_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    records = json.loads((tmp_path / "train.json").read_text())
    answers = {format_prompt(record): record["output"] for record in records}
    assert len(calls) == 4
    for ids, labels, _ in calls:
        for row, targets in zip(ids, labels, strict=True):
            assert torch.equal(row[targets != -100], targets[targets != -100])
            first = int((targets != -100).nonzero()[0])
            prompt = tokenizer.decode(row[:first], skip_special_tokens=True)
            assert (
                tokenizer.decode(targets[targets != -100]) == answers[prompt] + tokenizer.eos_token
            )
    for first, second in (calls[:2], calls[2:]):
        assert (
            first[2]
            == second[2]
            == sum((labels[:, 1:] != -100).sum() for _, labels, _ in (first, second))
        )


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_saved_is_a_plain_model(run, root, name):
    model, info = AutoModelForCausalLM.from_pretrained(run(name, "out"), output_loading_info=True)
    assert not any(info.values())
    base = AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base")
    assert model.lm_head.weight.dtype == torch.float32
    assert not torch.allclose(model.lm_head.weight, base.lm_head.weight, atol=1e-4)


@pytest.fixture
def plain_sft(root, tmp_path, arguments):
    """Makes TRL's own SFTTrainer on the same data, with or without an objective in the model."""

    def make(mode=None):
        from trl import SFTConfig, SFTTrainer

        def dataset(file):
            records = json.loads((tmp_path / file).read_text())
            return Dataset.from_list(
                [{"prompt": format_prompt(r), "completion": r["output"]} for r in records]
            )

        model = AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base")
        if mode:
            attach_objective(model, mode)
        settings = SFTConfig(output_dir=str(tmp_path / "plain"), bf16=False, **SETTINGS)
        tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
        return SFTTrainer(
            model,
            settings,
            train_dataset=dataset("train.json"),
            eval_dataset=dataset("held.json"),
            processing_class=tokenizer,
        )

    return make


@NEEDS_TRL
def test_mle_is_what_trl_trains_without_us(run, plain_sft, tmp_path):
    trainer = plain_sft()
    trainer.train()
    trainer.evaluate()
    trainer.save_state()
    assert_same_runs(run("trl_sft", "mle", mode="mle"), tmp_path / "plain")


@NEEDS_TRL
def test_trls_own_loss_in_place_of_the_objective_is_an_error(plain_sft):
    with pytest.raises(ValueError, match="see examples/trl_sft"):
        plain_sft("emo").train()


@pytest.mark.parametrize("name", ["hf_trainer", pytest.param("trl_sft", marks=NEEDS_TRL)])
def test_options_that_replace_the_loss_are_refused(run, name):
    with pytest.raises(ValueError, match="leave them off"):
        run(name, "out", label_smoothing_factor=0.1)


@NEEDS_TRL
def test_packed_examples_do_not_see_each_other(run, calls):
    settings = {
        "mode": "mix",
        "max_steps": 1,
        "per_device_train_batch_size": 20,
        "completion_only_loss": False,
    }
    packed = run("trl_sft", "packed", packing=True, **settings, gradient_accumulation_steps=1)
    ((ids, labels, _),) = calls
    # The first token of every example is not a target.
    assert ids.shape[0] == 1 and (labels == -100).sum() > 1
    assert_same_runs(packed, run("trl_sft", "padded", **settings))
