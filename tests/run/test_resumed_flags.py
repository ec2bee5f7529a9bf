"""Tests runs that resume with other flags.

The new numbers hold from the first resumed step on. Flags that cannot change are refused.
"""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from stanford_alpaca.errors import ResumeError
from stanford_alpaca.run.arguments import OLDER_NAMES, TrainingArguments
from stanford_alpaca.run.trainer_flags import HONOURED, REFUSED
from stanford_alpaca.train import train
from tests.helpers import steps
from tests.ranks import run_ranks

SAVED = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "max_steps": 2}


@pytest.fixture
def trained(arguments, tmp_path):
    """A run of two steps with a checkpoint of each.

    Returns a function that makes the argv of a run that resumes from the first, by default for one
    step.
    """
    train(arguments(**SAVED))

    def going_on(name, *flags, **changes):
        resume = {
            "output_dir": tmp_path / name,
            "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1",
        }
        return arguments(*flags, **SAVED | resume | changes)

    return going_on


def weights(folder):
    return {
        name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()
    }


def moved(tmp_path, name):
    """Returns by how much the second step has moved the weights."""
    before, after = weights(tmp_path / "out" / "checkpoint-1"), weights(tmp_path / name)
    return {key: after[key] - before[key] for key in before}


def groups_of(folder):
    return torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"]


def test_unchanged_flags_go_on_bit_for_bit(trained, tmp_path):
    train(trained("again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_another_learning_rate_moves_the_weights_by_as_much(trained, tmp_path, capsys):
    train(trained("slow", learning_rate=1e-4))
    assert "checkpoint-1: --learning_rate was 0.001, is 0.0001" in capsys.readouterr().out
    assert [step["learning_rate"] for step in steps(tmp_path / "slow")] == [0.001, 0.0001]
    for key, delta in moved(tmp_path, "out").items():
        torch.testing.assert_close(moved(tmp_path, "slow")[key], delta / 10, rtol=1e-3, atol=2e-7)


def test_another_decay_shrinks_the_weights_by_as_much(trained, tmp_path):
    train(trained("decayed", weight_decay=5.0))
    before = weights(tmp_path / "out" / "checkpoint-1")
    decayed = 0
    for key, delta in moved(tmp_path, "out").items():
        shrunk = moved(tmp_path, "decayed")[key] - delta
        decays = "norm" not in key
        decayed += decays
        torch.testing.assert_close(shrunk, -1e-3 * 5.0 * before[key] * decays, rtol=1e-3, atol=5e-7)
    assert decayed > 20 and {
        group["weight_decay"] for group in groups_of(tmp_path / "decayed")
    } == {5.0, 0.0}


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        ({"adam_beta1": 0.5, "adam_beta2": 0.7}, {"betas": (0.5, 0.7)}),
        ({"adam_epsilon": 1e-3}, {"eps": 1e-3}),
    ],
)
def test_other_moments_are_used_and_saved(trained, tmp_path, flags, numbers):
    train(trained("other", **flags))
    for group in groups_of(tmp_path / "other"):
        assert {name: group[name] for name in numbers} == numbers
    one, other = weights(tmp_path / "out"), weights(tmp_path / "other")
    assert max((one[key] - other[key]).abs().max() for key in one) > 1e-5


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ({"lr_scheduler_type": "linear", "max_steps": 4}, [0.001, 0.00075, 0.0005, 0.00025]),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "max_steps": 4},
            [0.001, 0.00025, 0.0005, 0.00075],
        ),
        (
            {"lr_scheduler_type": "linear", "max_steps": 4, "learning_rate": 0.01},
            [0.001, 0.0075, 0.005, 0.0025],
        ),
    ],
)
def test_another_schedule_is_followed_from_the_first_step_on(trained, tmp_path, flags, rates):
    train(trained("other", **flags))
    assert [step["learning_rate"] for step in steps(tmp_path / "other")] == pytest.approx(
        rates, rel=1e-9
    )


def test_a_schedule_that_had_ended_goes_on(arguments, tmp_path):
    settings = SAVED | {"lr_scheduler_type": "cosine"}
    train(arguments(**settings))
    resume = {
        "output_dir": tmp_path / "longer",
        "resume_from_checkpoint": tmp_path / "out" / "checkpoint-2",
        "max_steps": 4,
    }
    train(arguments(**settings | resume))
    rates = [step["learning_rate"] for step in steps(tmp_path / "longer")]
    assert rates[2:] == pytest.approx([0.0005, 0.001 * (1 + 2**-0.5 * -1) / 2], rel=1e-6)


def test_fewer_steps_than_were_made_train_nothing_and_say_so(arguments, trained, tmp_path, capsys):
    argv = arguments(**SAVED | {"max_steps": 1, "resume_from_checkpoint": True})
    capsys.readouterr()
    train(argv)
    assert "the checkpoint is of step 2 of 1: nothing is trained" in capsys.readouterr().out


def test_a_plateaus_rate_is_its_own(arguments, tmp_path):
    settings = SAVED | {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_path": tmp_path / "held.json",
        "eval_strategy": "steps",
    }
    train(arguments(**settings, eval_steps=1))
    resume = {
        "output_dir": tmp_path / "again",
        "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1",
    }
    with pytest.raises(ResumeError, match=r"--learning_rate was 0.001, is 0.01"):
        train(arguments(**settings | resume | {"eval_steps": 1, "learning_rate": 0.01}))


@pytest.mark.parametrize(("engine", "lora"), [("fsdp", False), ("zero2", True)])
def test_every_engine_holds_to_the_flags(arguments, tmp_path, engine, lora):
    changed = {
        "learning_rate": 1e-4,
        "weight_decay": 2.0,
        "adam_beta1": 0.5,
        "lr_scheduler_type": "linear",
        "max_steps": 4,
    }
    for name, run in (("one", train), (engine, lambda argv: run_ranks(2, train, argv))):
        own = {} if name == "one" else {"engine": engine, "per_device_train_batch_size": 2}
        settings = SAVED | own | {"output_dir": tmp_path / name, "lora": lora, "global_batch": 16}
        run(arguments(**settings))
        resume = {
            "output_dir": tmp_path / f"{name}-on",
            "resume_from_checkpoint": tmp_path / name / "checkpoint-2",
        }
        run(arguments(**settings | resume | changed))
    one, many = steps(tmp_path / "one-on"), steps(tmp_path / f"{engine}-on")
    assert [step["learning_rate"] for step in many] == [step["learning_rate"] for step in one]
    assert [step["learning_rate"] for step in many][2:] == pytest.approx([0.00005, 0.000025])
    for a, b in zip(one, many, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-4) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-2
        )
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    ours, theirs = (
        load_file(tmp_path / f"{engine}-on" / file),
        load_file(tmp_path / "one-on" / file),
    )
    for key in ours:
        # Adam makes large steps from gradients that are rounding alone: few entries may differ
        far = ~torch.isclose(ours[key], theirs[key], rtol=1e-3, atol=2e-5)
        assert far.float().mean() < 1e-3
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=2e-4)


def test_deepspeeds_own_optimizer_goes_on_with_its_numbers_or_not_at_all(arguments, tmp_path):
    config = {
        "zero_optimization": {"stage": 2},
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto", "warmup_min_lr": 0},
        },
    }
    (tmp_path / "zero.json").write_text(json.dumps(config))
    settings = {
        "deepspeed": tmp_path / "zero.json",
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
        "warmup_steps": 1,
    }
    run_ranks(1, train, arguments(**settings))
    resume = {
        "output_dir": tmp_path / "again",
        "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1",
    }
    run_ranks(
        1,
        refused,
        arguments(**settings | resume | {"learning_rate": 1e-4}),
        "--learning_rate has changed, and --deepspeed",
    )
    run_ranks(1, train, arguments(**settings | resume | {"output_dir": tmp_path / "same"}))


def refused(argv, message):
    with pytest.raises(ResumeError, match=message):
        train(argv)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cost": "adaptive"}, "--cost was frozen, is adaptive"),
        ({"cost_kind": "centred"}, "--cost_kind was cosine, is centred"),
        ({"cost_kind": "shuffled", "cost_seed": 3}, "--cost_seed was 0, is 3"),
    ],
)
def test_another_cost_is_said(trained, capsys, changes, told):
    train(trained("priced", **changes))
    assert told in capsys.readouterr().out


# ---- flags that would do nothing -----------------------------------------------------------------


def test_every_flag_of_the_trainer_is_honoured_or_refused():
    theirs = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    if OLDER_NAMES:  # these two are ours then
        theirs |= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert theirs - HONOURED - REFUSED.keys() == set(), (
        "new flags: honour them, or refuse them by name"
    )
    assert (HONOURED | REFUSED.keys()) - theirs == set() and not HONOURED & REFUSED.keys()
    assert theirs <= {f.name for f in dataclasses.fields(TrainingArguments)}
