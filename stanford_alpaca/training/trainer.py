"""The Hugging Face Trainer with what EMO needs: its log entries and token-weighted evaluation."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from stanford_alpaca.checkpoint.pickles import restrict_deepspeed
from stanford_alpaca.data.balance import BalancedSampler
from stanford_alpaca.data.batching import (
    Collator,
    PadCollator,
    count_examples,
    count_tokens,
    pad_to_multiple,
)
from stanford_alpaca.data.packing import PackedExamples, example_lengths
from stanford_alpaca.distributed.shards import Shards, gate_step
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.objective.attach import AttachedObjective
from stanford_alpaca.training.engines import check_engine
from stanford_alpaca.training.fsdp import activate_fsdp
from stanford_alpaca.training.guard import Guard
from stanford_alpaca.training.hardware import peak_flops, training_flops
from stanford_alpaca.training.resumable_trainer import ResumableTrainer
from stanford_alpaca.training.stopwatch import Stopwatch


class EmoTrainer(ResumableTrainer):
    """A Trainer for a model with an attached objective and one of our collators.

    Each log entry of training also has:

    - ``nll``, ``target_prob`` and, where the mode computes it, ``emo``: means over the supervised
      tokens of all ranks since the last entry.
    - ``supervised_tokens_per_s``: of all ranks together, without the first step, evaluation and
      saves.
    - ``mfu``, at 16 bits on a device of known peak: this rank's model FLOPs utilisation.
    - ``examples``, with packed rows: how many a step saw, on average since the last entry.
    - ``skipped_steps`` and ``loss_spikes``, once there are any: both since the run began.

    Evaluation sums over the supervised tokens of all ranks and divides once, so it does not depend
    on batch size or world size. The training set is filled up to whole global batches with fully
    masked rows, which the sampler shuffles in. So no example is seen twice or dropped, whatever the
    world size.

    No update is made from what is not finite, see ``Guard``. A skipped step leaves no trace in the
    log's means.

    Collectives of its own: one all-reduce of 5 float64 per step, per log entry and per evaluation.
    That of a step is the ``Guard``'s, and also carries whether any rank was asked to stop. With
    packed rows, a log entry has one more of 1 float64.
    """

    data_collator: Collator
    train_dataset: Any

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        # The objective accepts them, whatever the model's own forward says.
        self.model_accepts_loss_kwargs = True
        self.emo: AttachedObjective = self.accelerator.unwrap_model(self.model).emo_objective
        self.emo.seeds.seed = self.args.seed
        self.watch = Stopwatch()
        self.guard = Guard(
            self.args.device, self.args.world_size, self.args.skip_nonfinite, fp16=self.args.fp16
        )
        self.guard.stop_requested = lambda: bool(self.stop)
        self._steps = 0  # the steps of this call of train()
        self._skipped = 0  # of these, the steps that changed nothing
        self._tokens: Any = 0  # the targets of these steps, without the first step's
        self._flops: Any = 0.0  # this rank's FLOPs in these steps, without the first step's
        self._packed = isinstance(self.train_dataset, PackedExamples)
        self._examples: Any = 0  # this rank's examples since the last log entry
        self._logged_steps = 0  # the value of _steps at the last log entry
        self._peak = peak_flops() if self.args.bf16 or self.args.fp16 else None
        self._linear, self._quadratic = training_flops(self.model) if self._peak else (0.0, 0.0)
        # A stream has no end to fill up.
        if isinstance(self.train_dataset, Dataset | PackedExamples):
            batch = (
                self.args.train_batch_size
                * self.args.gradient_accumulation_steps
                * self.args.world_size
            )
            self.train_dataset = pad_to_multiple(
                self.train_dataset, batch, self.data_collator.pad_id
            )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            # Otherwise accelerate takes it from DeepSpeed's configuration, and warns.
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps
            restrict_deepspeed()
        activate_fsdp(self)

    # ---- training ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self._steps == 0:
            check_engine(self)
            self._start_guard()
        if self._steps == 1:
            self.watch.start()  # the first step, with its warm-up, has ended
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        if self._steps >= 1:
            # A tensor on the device, so this does not synchronise.
            self._tokens = self._tokens + num_items
            if self._peak:
                sums = [count_tokens(sample) for sample in samples]
                self._flops = self._flops + sum(
                    self._linear * n + self._quadratic * squares for n, squares in sums
                )
        if self._packed:
            self._examples = self._examples + sum(count_examples(sample) for sample in samples)
        self._steps += 1
        self.guard.begin()
        self._batch, self._loss_before = (samples, num_items), self._tr_loss.clone()
        self.emo.train_meter.mark()
        return samples, num_items

    def _start_guard(self) -> None:
        zero = self.model_wrapped.optimizer if self.is_deepspeed_enabled else None
        shards = Shards(self.accelerator.unwrap_model(self.model), zero)
        again = (
            self._compute_again if isinstance(self.model_wrapped, DistributedDataParallel) else None
        )
        self.guard.start(shards, self.state.stateful_callbacks.get("guard", {}), again)
        if zero is not None:  # DeepSpeed's backward pass makes the update
            gate_step(zero, lambda: self.guard.may_update(self.state.global_step + 1))

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if torch.is_grad_enabled():
            self.guard.watch(loss)
        return loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.emo.seeds.at(self.state.global_step + 1)
        loss = super().training_step(model, *args, **kwargs)
        if not self.accelerator.sync_gradients:  # more micro-batches of this step follow
            return loss
        if not self.is_deepspeed_enabled and not self.guard.may_update(self.state.global_step + 1):
            self._drop_gradients()
        if not self.guard.skipping:
            return loss
        self._tr_loss.copy_(self._loss_before)
        self.emo.train_meter.back()
        self._globalstep_last_logged += 1  # the log's means leave out skipped steps
        self._skipped += 1
        return torch.zeros_like(loss)

    def _drop_gradients(self) -> None:
        for parameter in self.model_wrapped.parameters():
            if parameter.grad is not None and self.args.fp16:
                parameter.grad.fill_(math.nan)  # makes the loss scaler skip the update
            else:
                # Without a gradient the optimizer changes nothing: no weight decay, no moments.
                parameter.grad = None
        # The Trainer works this out from the gradients, and there are none now.
        self._mixed_mesh_grads = None

    def _compute_again(self) -> None:
        """Computes this step's gradients again: each rank's own, not DDP's mean over the ranks."""
        model, (samples, num_items) = self.model_wrapped, self._batch
        model.zero_grad()
        with preserved_rng(), self.accelerator.no_sync(model):
            for inputs in samples:
                super().training_step(model, inputs, num_items)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        # This comes after accelerate has chosen the sampler, so the shuffling stays the same.
        if self.args.balance_lengths:
            # the batch sampler of all ranks
            batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
            data, args = self.train_dataset, self.args
            lengths = data.row_lengths() if self._packed else example_lengths(data)
            loader.set_sampler(
                BalancedSampler(
                    batches.sampler,
                    lengths,
                    args.train_batch_size,
                    args.world_size,
                    args.gradient_accumulation_steps,
                    padded=isinstance(self.data_collator, PadCollator),
                )
            )
        return loader

    def examples_per_step(self) -> float:
        """Returns the mean number of examples in a step, over all ranks, since the last call.

        One all-reduce of 1 float64.
        """
        examples = torch.as_tensor(self._examples, dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(examples)
        steps = self._steps - self._logged_steps
        self._examples, self._logged_steps = 0, self._steps
        return float(examples) / steps

    def supervised_tokens_per_s(self) -> float | None:
        """Returns all ranks' supervised tokens per second of training; None in the first step."""
        return float(self._tokens) / self.watch.seconds if self.watch.seconds > 0 else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.emo.train_meter.drain(self.args.device, over_ranks=self.args.world_size > 1)
            if sums.tokens:
                logs["nll"] = sums.nll / sums.tokens
                if self.emo.teacher is None:  # with a teacher, exp(-nll) is no probability
                    logs["target_prob"] = sums.target_prob / sums.tokens
                if self.emo.objective.needs_emo:
                    logs["emo"] = sums.emo / sums.tokens
            if self._packed:
                logs["examples"] = self.examples_per_step()
            rate = self.supervised_tokens_per_s()
            if rate is not None:
                logs["supervised_tokens_per_s"] = rate
                if self._peak:
                    logs["mfu"] = float(self._flops) / self.watch.seconds / self._peak
            if self.guard.skipping:
                logs.pop("grad_norm", None)
        if "train_loss" in logs:
            # transformers 5.17 divides by the steps of all calls, and no release leaves skipped out
            trained = max(self._steps - self._skipped, 1)
            logs["train_loss"] = self._total_loss_scalar / trained
        if "loss" in logs or "train_loss" in logs:
            logs |= self.guard.counts()
        super().log(logs, start_time)

    def agreed_to_stop(self) -> bool:
        return self.guard.stop_agreed

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.watch.paused():
            if self._steps:
                self.guard.check_weights(self.state.global_step)
                self.state.stateful_callbacks["guard"] = self.guard.state_dict()
            super()._save_checkpoint(*args, **kwargs)

    def save_finished(self) -> dict[str, Any]:
        if self._steps:  # otherwise the weights are those that were loaded
            self.guard.check_weights(self.state.global_step)
        return super().save_finished()

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Returns token-weighted loss, nll, perplexity, target_prob and, with a cost, emo."""
        self.emo.eval_meter.drain("cpu")
        # Random states are kept, so a run resumed after an evaluation goes on as if uninterrupted.
        with self.watch.paused(), preserved_rng():
            output = super().evaluation_loop(
                dataloader,
                description,
                prediction_loss_only=True,
                metric_key_prefix=metric_key_prefix,
            )
            sums = self.emo.eval_meter.drain(self.args.device, over_ranks=self.args.world_size > 1)
        nll = sums.nll / sums.tokens
        metrics = {
            "loss": sums.loss / sums.tokens,
            "nll": nll,
            "perplexity": math.exp(min(nll, 700.0)),
        }
        metrics["target_prob"] = sums.target_prob / sums.tokens
        if self.emo.has_cost:
            metrics["emo"] = sums.emo / sums.tokens
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, output.num_samples)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batch = self.args.eval_batch_size * self.args.world_size
        return super().get_eval_dataloader(
            pad_to_multiple(dataset, batch, self.data_collator.pad_id)
        )

    # ---- the hub ----

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with _hub(
            f"--hub_model_id {self.args.hub_model_id}: "
            "there is no such repository and it cannot be made"
        ):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        with _hub(
            f"--push_to_hub: the model is complete in {self.args.output_dir}, "
            "but could not be uploaded"
        ):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the Trainer's model card, unless the output folder already has the run's own."""
        if not (Path(str(self.args.output_dir)) / "README.md").exists():
            super().create_model_card(*args, **kwargs)


def preserved_rng() -> contextlib.AbstractContextManager:
    """Returns a context that restores the random states at its end."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextlib.contextmanager
def _hub(message: str) -> Iterator[None]:
    """Turns errors of the hub's client into a UserError: no network, no permission, no space."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{message} ({first_line(error)})") from None
