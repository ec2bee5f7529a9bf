"""Tests runs with --packing, --padding_free and --balance_lengths.

Their losses are the same as without these flags, on one process and on two.
"""

from types import SimpleNamespace

import pytest

from stanford_alpaca import attach_objective
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.errors import UserError
from stanford_alpaca.objective.teacher import Teacher
from stanford_alpaca.run.build import make_collator
from stanford_alpaca.train import train
from tests.helpers import evaluations, steps
from tests.ranks import run_ranks


def assert_same_steps(one, two):
    assert len(one) == len(two) > 0
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["nll"] == pytest.approx(theirs["nll"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_step_over_all_rows_is_one_over_all_examples(arguments, tmp_path, capsys):
    """40 examples are one global batch.

    They take 40 rows, or fewer rows that are filled up.
    """
    (tmp_path / "prompts.txt").write_text("Name a bird.\n")
    settings = {
        "model_max_length": 192,
        "per_device_train_batch_size": 8,
        "global_batch": 40,
        "max_steps": 2,
        "eval_path": tmp_path / "held.json",
    }
    train(arguments(output_dir=tmp_path / "plain", **settings))
    samples = {
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_steps": 1,
        "sample_max_new_tokens": 3,
    }
    train(arguments("--packing", output_dir=tmp_path / "packed", **settings, **samples))
    assert "packed 40 examples into 1" in capsys.readouterr().out
    train(
        arguments("--padding_free", "--balance_lengths", output_dir=tmp_path / "free", **settings)
    )
    plain = steps(tmp_path / "plain")
    for name in ("packed", "free"):
        assert_same_steps(steps(tmp_path / name), plain)
        assert evaluations(tmp_path / name)[-1]["eval_nll"] == pytest.approx(
            evaluations(tmp_path / "plain")[-1]["eval_nll"], rel=1e-5
        )
    assert [entry["examples"] for entry in steps(tmp_path / "packed")] == [40, 40]
    assert "examples" not in plain[0]


def test_balanced_runs_take_the_same_steps_and_resume(arguments, tmp_path):
    # An epoch has 3 steps, the last one filled up.
    settings = {"per_device_train_batch_size": 2, "max_steps": 4}
    train(arguments(output_dir=tmp_path / "plain", **settings))
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(arguments("--balance_lengths", output_dir=tmp_path / "balanced", **settings, **saving))
    assert_same_steps(steps(tmp_path / "balanced"), steps(tmp_path / "plain"))
    resume = {
        "resume_from_checkpoint": tmp_path / "balanced" / "checkpoint-2",
        "output_dir": tmp_path / "resumed",
    }
    train(arguments("--balance_lengths", **settings | resume))
    assert_same_steps(steps(tmp_path / "resumed"), steps(tmp_path / "plain"))


def test_two_processes_see_the_rows_of_one(arguments, tmp_path):
    settings = {"model_max_length": 128, "per_device_train_batch_size": 2, "global_batch": 4}
    train(arguments("--packing", output_dir=tmp_path / "one", **settings))
    run_ranks(
        2,
        train,
        arguments(
            "--packing", "--balance_lengths", "--fsdp", output_dir=tmp_path / "two", **settings
        ),
    )
    assert_same_steps(steps(tmp_path / "two"), steps(tmp_path / "one"))
    seen = [[entry["examples"] for entry in steps(tmp_path / name)] for name in ("one", "two")]
    assert seen[0] == seen[1] and all(4 <= examples <= 12 for examples in seen[0])


def test_what_cannot_be_packed_is_refused_before_anything_is_written(arguments, tmp_path):
    for flags, message in [
        (["--packing", "--streaming"], "a stream's lengths are unknown"),
        (["--balance_lengths", "--streaming"], "a stream's lengths are unknown"),
        (["--balance_lengths", "--train_sampling_strategy", "group_by_length"], "choose one"),
    ]:
        with pytest.raises(UserError, match=message):
            train(arguments(*flags))
    assert not (tmp_path / "out").exists()


def test_collators_are_what_the_model_and_the_teacher_heed(make_model):
    def collator(packing, padding_free):
        data = SimpleNamespace(packing=packing, padding_free=padding_free)
        training = SimpleNamespace(fsdp=False, world_size=1)
        return make_collator(SimpleNamespace(data=data, training=training), model, 0)

    model = make_model("opt", attn_implementation="eager")
    attach_objective(
        model, "mle", teacher=Teacher(make_model("llama", attn_implementation="eager"), 5)
    )
    assert collator(False, False) == PadCollator(0)
    assert (
        collator(True, False).apart_by,
        collator(True, False).flat,
        collator(False, True).flat,
    ) == ("bias", False, True)
    model = make_model("llama")
    attach_objective(model, "mle", teacher=Teacher(make_model("opt"), 5))
    # The teacher would need another mask than the student.
    with pytest.raises(UserError, match=r"the teacher \(OPTForCausalLM"):
        collator(True, False)
    model = make_model("mixtral-routed")
    attach_objective(model, "mle")
    with pytest.raises(UserError, match="add --padding_free"):
        collator(True, False)
    assert collator(True, True).flat
