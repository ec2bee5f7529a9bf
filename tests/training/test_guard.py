"""Tests that non-finite values never become an update.

Faults are put into loss, gradients and weights by hand, with every engine.
"""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stanford_alpaca import train as command
from stanford_alpaca.distributed.shards import Shards
from stanford_alpaca.errors import UserError
from stanford_alpaca.objective import attach
from stanford_alpaca.training.guard import Guard
from stanford_alpaca.training.trainer import EmoTrainer
from tests.helpers import steps
from tests.ranks import run_ranks

NORM = "model.norm.weight"


class Faulty(EmoTrainer):
    """A trainer with a fault in its loss, a gradient or a weight.

    The fault occurs in the steps ``at`` on one rank. That rank also asks to stop in these steps.
    For each of them, ``after`` says whether this rank's weights were unchanged bit for bit after
    the step, and whether all ranks knew about the stop request.
    """

    fault: ClassVar[str]
    value: ClassVar[float]
    at: ClassVar[tuple[int, ...]]
    rank: ClassVar[int]
    after: ClassVar[list[tuple[bool, bool]]]

    def now(self) -> bool:
        return self.state.global_step + 1 in self.at

    def own(self) -> bool:
        return self.now() and self.args.process_index == self.rank and self.model.training

    def get_batch_samples(self, *args, **kwargs):
        samples = super().get_batch_samples(*args, **kwargs)
        self.look()
        self.guard.stop_requested = self.own
        if self.fault == "gradient" and self._steps == 1:
            self.accelerator.unwrap_model(self.model).model.norm.register_forward_pre_hook(
                self.spoil
            )
        if self.fault == "weight" and self.own():
            self.spoil_weight()
        self.before = (
            [part.detach().clone() for _, part in self.guard.shards.weights()]
            if self.now()
            else None
        )
        return samples

    def _leave(self, *args, **kwargs) -> None:
        """Does nothing: other tests check what a stop request leads to."""

    def look(self) -> None:
        if getattr(self, "before", None) is not None:
            pairs = zip(self.before, self.guard.shards.weights(), strict=True)
            same = all(
                torch.equal(a.nan_to_num(7), b.detach().nan_to_num(7)) for a, (_, b) in pairs
            )
            self.after.append((same, self.guard.stop_agreed))

    def spoil_weight(self) -> None:
        (part,) = [
            part
            for name, part in self.guard.shards.weights(trained_only=False)
            if name.endswith(NORM)
        ]
        part.data.view(-1)[:1] = self.value

    def spoil(self, module, inputs) -> None:
        if not hasattr(module.weight, "spoilt"):
            module.weight.spoilt = True
            module.weight.register_hook(lambda g: g + self.value if self.own() else g)

    def compute_loss(self, *args, **kwargs):
        plain = attach.linear_loss_and_stats

        def spoilt(*inputs, **options):
            loss, stats = plain(*inputs, **options)
            return (
                (loss + self.value, stats) if self.fault == "loss" and self.own() else (loss, stats)
            )

        attach.linear_loss_and_stats = spoilt
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            attach.linear_loss_and_stats = plain

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.look()


def faulty(fault: str, value: float, at: tuple[int, ...], rank: int) -> type[Faulty]:
    given = {"fault": fault, "value": value, "at": at, "rank": rank, "after": []}
    return type("Faulty", (Faulty,), given)


def spoilt_runs(
    runs: list[tuple[list[str], str, float, tuple[int, ...], int]],
) -> list[tuple[str, list]]:
    """Returns the error message of each run, and what ``after`` says of its faulty steps."""
    results = []
    for argv, *fault in runs:
        command.EmoTrainer = faulty(*fault)
        try:
            command.train(argv)
            message = ""
        except UserError as error:
            message = str(error)
        results.append((message, command.EmoTrainer.after))
    return results


SAVED = {"save_strategy": "steps", "save_steps": 2}
ADVICE = "; lower --learning_rate, look at the data, or allow --skip_nonfinite N steps"


def test_every_rank_stops_before_the_update_and_names_the_culprit(arguments, tmp_path):
    names = ("loss", "inf", "gradient", "weight")
    argv = {name: arguments(output_dir=tmp_path / name, engine="ddp", **SAVED) for name in names}
    runs = [
        (argv["loss"], "loss", math.nan, (2,), 1),
        (argv["inf"], "loss", math.inf, (2,), 0),
        (argv["gradient"], "gradient", math.nan, (2,), 1),
        (argv["weight"], "weight", math.inf, (2,), 1),
    ]
    for results in run_ranks(2, spoilt_runs, runs):
        (loss, inf, gradient, weight), after = zip(*results, strict=True)
        assert loss == f"step 2: not finite: the loss on rank 1{ADVICE}"
        assert inf == f"step 2: not finite: the loss on rank 0{ADVICE}"
        assert gradient == f"step 2: not finite: the gradient of {NORM} on rank 1{ADVICE}"
        assert weight.startswith(
            f"step 2: not finite: the weight {NORM} on rank 1; the loss on rank 1;"
        )
        assert weight.endswith(
            "go on from an earlier checkpoint, or begin again, with a lower --learning_rate"
        )
        assert after == ([(True, True)],) * 4
    assert not list(tmp_path.glob("*/checkpoint-*"))


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_sharded_engines_stop_and_skip_alike(arguments, tmp_path, engine):
    argv = {
        name: arguments(output_dir=tmp_path / name, engine=engine, **SAVED)
        for name in ("gradient", "weight")
    }
    skips = arguments(output_dir=tmp_path / "skips", engine=engine, skip_nonfinite=2, max_steps=4)
    runs = [
        (argv["gradient"], "gradient", math.inf, (2,), 1),
        (argv["weight"], "weight", math.nan, (2,), 0),
        (skips, "loss", math.nan, (2, 3), 1),
    ]
    for results in run_ranks(2, spoilt_runs, runs):
        (gradient, weight, skipped), after = zip(*results, strict=True)
        assert gradient.startswith(f"step 2: not finite: the gradient of {NORM} in the shard of ")
        assert weight.startswith(f"step 2: not finite: the weight {NORM} ")
        assert skipped == "" and after == ([(True, True)], [(True, True)], [(True, True)] * 2)
    assert not list(tmp_path.glob("*/checkpoint-*"))
    log = steps(tmp_path / "skips")
    assert [(entry["step"], entry.get("skipped_steps")) for entry in log] == [(1, None), (4, 2)]
    assert load_file(tmp_path / "skips" / "model.safetensors")["model.norm.weight"].isfinite().all()


class Blind(EmoTrainer):
    """A trainer that ignores the second step's gradients, which are finite."""

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if self.state.global_step == 1:
            model.zero_grad()
        return norm


def log_of(folder: Path) -> list[dict]:
    kept = ("step", "loss", "nll", "emo", "target_prob", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in kept} for entry in steps(folder)]


def test_a_skipped_step_leaves_no_trace_and_is_counted_across_a_resume(
    arguments, tmp_path, monkeypatch
):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
    }
    skip = arguments(output_dir=tmp_path / "skip", skip_nonfinite=1, **settings)
    monkeypatch.setattr(command, "EmoTrainer", faulty("loss", math.nan, (2,), 0))
    command.train(skip)
    monkeypatch.setattr(command, "EmoTrainer", Blind)
    command.train(arguments(output_dir=tmp_path / "blind", **settings))
    one, two = log_of(tmp_path / "skip"), log_of(tmp_path / "blind")
    assert one == [entry for entry in two if entry["step"] != 2] and len(one) == 3
    skipped, blind = (
        load_file(tmp_path / name / "model.safetensors") for name in ("skip", "blind")
    )
    assert all(torch.equal(skipped[name], blind[name]) for name in blind)
    assert [entry.get("skipped_steps") for entry in steps(tmp_path / "skip")] == [None, 1, 1]
    results = [
        json.loads((tmp_path / name / "train_results.json").read_text())["train_loss"]
        for name in ("skip", "blind")
    ]
    assert (
        results[0]
        == pytest.approx(sum(entry["loss"] for entry in one) / 3)
        != pytest.approx(results[1])
    )

    # When every other step is logged, the mean is that of the one good step.
    monkeypatch.setattr(command, "EmoTrainer", faulty("loss", math.nan, (2,), 0))
    command.train(
        arguments(
            output_dir=tmp_path / "every2",
            skip_nonfinite=1,
            **settings | {"max_steps": 2, "logging_steps": 2},
        )
    )
    (entry,) = steps(tmp_path / "every2")
    assert [entry[name] for name in ("loss", "nll", "emo")] == [
        one[0][name] for name in ("loss", "nll", "emo")
    ]
    assert "grad_norm" not in entry

    resumed = arguments(
        output_dir=tmp_path / "again",
        resume_from_checkpoint=tmp_path / "skip" / "checkpoint-3",
        **settings,
    )
    monkeypatch.setattr(command, "EmoTrainer", faulty("loss", math.inf, (4,), 0))
    with pytest.raises(
        UserError, match="step 4: not finite: the loss; the 1 of --skip_nonfinite are used up"
    ):
        command.train([*resumed, "--skip_nonfinite", "1"])


def test_a_frozen_weight_is_named_though_only_the_loss_shows_it(arguments, monkeypatch):
    monkeypatch.setattr(command, "EmoTrainer", faulty("weight", math.nan, (2,), 0))
    with pytest.raises(
        UserError,
        match=(
            rf"step 2: not finite: the weight \S*{NORM}; the loss; "
            "go on from an earlier checkpoint"
        ),
    ):
        command.train(arguments("--lora", skip_nonfinite=5))
    assert command.EmoTrainer.after == [(True, True)]


def guard_of(model: nn.Module, state: dict | None = None) -> Guard:
    guard = Guard(torch.device("cpu"), world_size=1)
    guard.start(Shards(model), state or {})
    return guard


def feed(guard: Guard, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        guard.begin()
        guard.watch(torch.tensor(loss))
        assert guard.may_update(step) and not guard.stop_agreed


def test_a_spike_is_said_once_and_counted_across_a_resume(capsys):
    # like the losses of a training run
    falling = [2 + 8 / step + 0.1 * math.sin(step) for step in range(1, 61)]
    guard = guard_of(nn.Linear(1, 1))
    feed(guard, [1.0, 9.0, *falling])
    assert capsys.readouterr().out == "" and guard.counts() == {}
    resumed = guard_of(nn.Linear(1, 1), json.loads(json.dumps(guard.state_dict())))
    for one in (guard, resumed):
        feed(one, [9.81, 9.9, 2.1, 3.0, 9.7])
        middle = torch.tensor(falling[10:]).quantile(0.5).item()
        first, second = capsys.readouterr().out.splitlines()
        assert (
            first == f"step 1: the loss is 9.81; its median over the last 50 steps was {middle:.4g}"
        )
        assert second.startswith("step 5: the loss is 9.7;")
        assert one.counts() == {"loss_spikes": 3}


def test_weights_are_checked_before_they_are_saved():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    guard = guard_of(model)
    model[1].weight.data[0, 0] = math.nan  # a frozen weight may be non-finite as loaded
    guard.check_weights(7)
    model[0].bias.data[1] = -math.inf
    with pytest.raises(
        UserError, match=r"after step 7: not finite: the weight 0\.bias, 1\.weight; go on from"
    ):
        guard.check_weights(7)
    guard.begin()
    guard.watch(torch.tensor(1.0))  # the loss of a batch that does not use the weight
    with pytest.raises(
        UserError, match=r"^step 8: not finite: the weight 0\.bias, 1\.weight; go on from"
    ):
        guard.may_update(8)
