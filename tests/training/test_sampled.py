"""Training with sampled gradients of the output layer: what is drawn, when, and what it learns."""

import pytest
import torch
from safetensors.torch import load_file

from stanford_alpaca import attach_objective
from stanford_alpaca.errors import UserError
from stanford_alpaca.losses.backends.sampling import Seeds
from stanford_alpaca.train import train
from tests.helpers import steps


def test_a_resumed_run_draws_the_samples_of_an_uninterrupted_one(arguments, tmp_path, root):
    flags = {
        "head_gradient": "sampled",
        "head_epsilon": 0.01,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "global_batch": 8,
    }
    train(arguments(**flags))
    train(arguments(**flags | {"output_dir": tmp_path / "again", "max_steps": 2}))
    resumed = {
        "output_dir": tmp_path / "on",
        "resume_from_checkpoint": tmp_path / "out" / "checkpoint-2",
    }
    train(arguments(**flags | resumed))
    whole, on = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "on"))
    assert all(torch.equal(whole[key], on[key]) for key in whole)
    train(arguments(**flags | {"output_dir": tmp_path / "exact", "head_gradient": "exact"}))
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    assert any(not torch.equal(whole[key], exact[key]) for key in whole)


def test_seeds_follow_from_seed_step_and_call():
    seeds = Seeds(7)
    seeds.at(3)
    first, second = seeds.next(), seeds.next()
    seeds.at(3)
    third = seeds.next()
    again = Seeds(7)
    again.at(3)
    assert [again.next() for _ in range(3)] == [first, second, third]
    seeds.at(4)
    assert len({first, second, third, seeds.next(), Seeds(8, 3).next()}) == 5


def test_an_attached_model_draws_in_training_alone(make_model):
    model = make_model("llama")
    attached = attach_objective(model, "emo", head_gradient="sampled", head_epsilon=0.5)
    ids = torch.randint(97, (2, 12))
    with torch.no_grad():
        model(ids, labels=ids)
    assert attached.seeds.call == 0
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(model.lm_head.weight.grad.clone())
    assert attached.seeds.call == 2 and not torch.equal(*grads)
    attached.detach()
    with pytest.raises(ValueError, match="exact gradients alone"):
        attach_objective(model, "emo", head_gradient="sampled", backend="reference")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"head_epsilon": 0}, "--head_epsilon is 0.0, wanted a number between 0 and 1"),
        ({"head_gradient": "sampled", "loss_backend": "reference"}, "--loss_backend reference has"),
    ],
)
def test_flags_that_cannot_be(arguments, flags, message):
    with pytest.raises(UserError, match=message):
        train(arguments(**flags))


def test_it_learns_as_the_exact_gradient_does(arguments, tmp_path):
    flags = {"max_steps": 12, "learning_rate": 1e-3}
    train(arguments(**flags))
    train(arguments(**flags, head_gradient="sampled", output_dir=tmp_path / "sampled"))
    exact, sampled = (steps(tmp_path / name) for name in ("out", "sampled"))
    assert sampled[0]["loss"] == exact[0]["loss"]  # the loss itself is exact
    for one, other in zip(exact, sampled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
