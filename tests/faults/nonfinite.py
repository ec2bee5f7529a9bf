"""Numbers that are not finite, and batches without targets."""

import json
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import Trainer

from stanford_alpaca import train
from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.training.trainer import EmoTrainer
from tests.faults.harness import DDP, FSDP, PLAIN, Case, Setting, case, check
from tests.faults.hooks import Hooks, beside, rows_of
from tests.faults.world import World
from tests.helpers import steps

STEP = 4  # the step of the non-finite number; the last checkpoint before it is of step 2
MICRO_BATCHES = 2
# Runs are equal within these differences: absolute in the loss, relative in the gradient norm.
LOSS, NORM = 1e-5, 1e-4


class NotFinite:
    """Puts a non-finite value into step ``STEP`` of the child process.

    It writes down digests of the weights before that step and at the end of the run.
    """

    def __init__(self, hooks: Hooks, what: str, value: str, ranks: tuple[int, ...] | None):
        self.what, self.value, self.here = what, float(value), ranks is None or hooks.rank in ranks
        self.file, self.trainer, self.micro_batch = (
            beside(hooks.out, f"weights{hooks.rank}").open("w"),
            None,
            0,
        )
        step, loss, run = Trainer.training_step, Trainer.compute_loss, train.train

        def training_step(trainer, *args: Any, **kwargs: Any):
            self.trainer, now = trainer, trainer.state.global_step + 1 == STEP
            if now and self.micro_batch == 0:
                if what == "weight":
                    self.put(self.parameter().data)
                self.write()
            outcome = step(trainer, *args, **kwargs)
            self.micro_batch += now
            if now and what == "gradient" and self.micro_batch == MICRO_BATCHES:
                self.put(self.parameter().grad)
            return outcome

        def compute_loss(trainer, *args: Any, **kwargs: Any):
            value = loss(trainer, *args, **kwargs)
            now = (
                what == "loss"
                and self.here
                and trainer.state.global_step + 1 == STEP
                and self.micro_batch == 0
            )
            return value * self.value if now else value

        def to_the_end(*args: Any) -> None:
            try:
                run(*args)
            finally:
                self.write()

        Trainer.training_step, Trainer.compute_loss, train.train = (
            training_step,
            compute_loss,
            to_the_end,
        )

    def parameter(self) -> Any:
        return next(
            p
            for name, p in self.trainer.model.named_parameters()
            if name.endswith(TENSOR[self.what])
        )

    def put(self, tensor: Any) -> None:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local.view(-1)[0] = self.value

    def write(self) -> None:
        """Writes a digest of each weight, or of this rank's shard of it."""
        found = {}
        for name, weight in self.trainer.model.named_parameters():
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            found[name] = sha256(local.detach().numpy().tobytes()).hexdigest()
        self.file.write(json.dumps(found) + "\n")
        self.file.flush()


def nonfinite(rng: Random) -> list[Case]:
    def stops(
        world: World,
        out: Path,
        setting: Setting,
        what: str,
        value: str,
        ranks: tuple[int, ...] | None,
    ) -> None:
        ended = world.run(
            setting, out, more=partial(NotFinite, what=what, value=value, ranks=ranks)
        )
        check(set(ended.statuses) == {2}, f"statuses {ended.statuses}\n{ended.text[-2000:]}")
        check("Traceback" not in ended.text and len(set(ended.errors())) == 1, ended.text[-2000:])
        line = ended.errors()[0]
        for word in (
            f"step {STEP}",
            *(f"rank {rank}" for rank in ranks or ()),
            TENSOR.get(what, "loss"),
        ):
            check(word in line, f"{word} is not named: {line}")
        for rank in range(setting.ranks):
            before, after = (
                json.loads(text) for text in beside(out, f"weights{rank}").read_text().splitlines()
            )
            changed = [name for name in before if before[name] != after[name]]
            check(not changed, f"rank {rank}: {changed[:3]} changed")
        check(
            [folder.name for folder in manifest.checkpoints(out)] == ["checkpoint-2"],
            "there is a new checkpoint",
        )

    cases = []
    for number, setting in enumerate((PLAIN, DDP, FSDP)):
        last = (setting.ranks - 1,)
        for other, (what, ranks) in enumerate(
            [("loss", None), ("gradient", None), ("loss", last), ("weight", None)]
        ):
            value = ("nan", "inf")[(number + other) % 2]
            if setting.ranks == 1 and ranks:  # there is no other rank
                ranks, value = None, "inf"
            to = f", rank {ranks[0]} alone" if ranks else ""
            cases.append(
                case(
                    f"{value} in the {what}, {setting.name}{to}", stops, setting, what, value, ranks
                )
            )
    return cases


TENSOR = {"gradient": "layers.0.mlp.down_proj.weight", "weight": "layers.1.self_attn.q_proj.weight"}


def change_rows(hooks: Hooks, rows: list[list[int]], how: str) -> None:
    """Changes these rows in the child process.

    ``how`` is ``mask`` (mask their targets), ``drop`` (drop them from their batches), or ``skip``
    (skip step ``STEP``, which has them).
    """
    collate, step, chosen = (
        PadCollator.__call__,
        EmoTrainer.training_step,
        {tuple(row) for row in rows},
    )

    def changed(collator, examples: list[dict]) -> dict:
        there = [tuple(example["input_ids"]) in chosen for example in examples]
        masked = [
            {**e, "labels": [-100] * len(e["labels"])} if is_in else e
            for e, is_in in zip(examples, there, strict=True)
        ]
        left = [e for e, is_in in zip(examples, there, strict=True) if not is_in or how != "drop"]
        filler = {"input_ids": [0], "labels": [-100]}
        return collate(collator, masked if how == "mask" else left or [filler])

    def skipped(trainer, *args: Any, **kwargs: Any):
        skip = how == "skip" and trainer.state.global_step + 1 == STEP
        return torch.tensor(0.0) if skip else step(trainer, *args, **kwargs)

    PadCollator.__call__, EmoTrainer.training_step = changed, skipped


def masked_rows(rng: Random) -> list[Case]:
    def equal(world: World, out: Path, setting: Setting, which: str) -> None:
        changes: dict[str, Any] = {
            "model_name_or_path": world.folder / "sure",
            "learning_rate": 0.1,
            "optim": "sgd",
        }
        # Five steps are an epoch, so that each row occurs once.
        changes |= {"lr_scheduler_type": "constant", "save_strategy": "no", "max_steps": 5}
        rows = chosen(world, setting, which, changes)
        without = out.with_name("without")
        whole = which == "a whole batch"
        world.finish(setting, out, more=partial(change_rows, rows=rows, how="mask"), **changes)
        # A rank without rows could not take part, so one process trains on the rest, in the same
        # steps.
        alone = PLAIN if which == "a rank's" else setting
        world.finish(
            alone,
            without,
            more=partial(change_rows, rows=rows, how="skip" if whole else "drop"),
            **changes,
        )
        pairs = list(zip(steps(out), steps(without), strict=True))
        for one, two in pairs:
            if whole and one["step"] == STEP:
                check(one["loss"] == 0 and one["grad_norm"] == 0, f"a batch without targets: {one}")
                continue
            close = abs(one["loss"] - two["loss"]) <= LOSS
            close = close and abs(one["grad_norm"] - two["grad_norm"]) <= NORM * two["grad_norm"]
            check(
                close,
                f"step {one['step']}: {one['loss']}, {one['grad_norm']}; "
                f"without: {two['loss']}, {two['grad_norm']}",
            )
        check(len({one["loss"] for one, _ in pairs}) == len(pairs), "nothing was learned")

    return [
        case(f"{which}, {setting.name}", equal, setting, which)
        for which in ("one row", "a rank's", "a whole batch")
        for setting in (PLAIN, DDP, FSDP)
    ]


def chosen(world: World, setting: Setting, which: str, changes: dict[str, Any]) -> list[list[int]]:
    """Returns the rows of step ``STEP`` to mask: one row, a rank's rows, or all rows.

    If there is one process, a rank's rows are those of the last micro-batch.
    """
    usual = world.reference(setting, more=record_rows, **changes)
    ranks = [
        json.loads(beside(usual, f"rows{rank}").read_text().splitlines()[STEP - 1])
        for rank in range(setting.ranks)
    ]
    micro_batches = [batch for rank in ranks for batch in rank]
    if which == "one row":
        return [micro_batches[0][1]]
    if which == "a rank's":
        return (
            [row for batch in ranks[-1] for row in batch]
            if setting.ranks > 1
            else micro_batches[-1]
        )
    return [row for batch in micro_batches for row in batch]


def record_rows(hooks: Hooks) -> None:
    """Writes down the ids of every step's rows, by micro-batch, in the child process."""
    fetch, file = EmoTrainer.get_batch_samples, beside(hooks.out, f"rows{hooks.rank}").open("w")

    def recorded(trainer, *args: Any, **kwargs: Any):
        samples, items = fetch(trainer, *args, **kwargs)
        file.write(json.dumps([rows_of(sample) for sample in samples]) + "\n")
        file.flush()
        return samples, items

    EmoTrainer.get_batch_samples = recorded


ROWS = {"NaN and Inf": nonfinite, "fully masked rows": masked_rows}
