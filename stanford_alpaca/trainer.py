"""The Hugging Face Trainer with what EMO needs and no more: its numbers in the log, token-weighted evaluation."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, SaveStrategy
from transformers.training_args import OptimizerNames

from stanford_alpaca.attach import AttachedObjective
from stanford_alpaca.checkpoint import fsdp, manifest, plain, zero
from stanford_alpaca.checkpoint.gather import full_state_dict
from stanford_alpaca.checkpoint.kinds import FSDP, kind_of
from stanford_alpaca.checkpoint.saving import Staged, keep_newest
from stanford_alpaca.checkpoint.space import checkpoint_bytes
from stanford_alpaca.data.balance import BalancedSampler
from stanford_alpaca.data.batching import Collator, PadCollator, count_examples, count_tokens, fill_up
from stanford_alpaca.data.packing import PackedExamples, example_lengths
from stanford_alpaca.engines import activate_fsdp, check_engine, peak_flops, training_flops
from stanford_alpaca.errors import ResumeError, Stopped, UserError, first_line
from stanford_alpaca.guard import Guard
from stanford_alpaca.shards import Shards, stand_before


class Stopwatch:
    """Wall time in seconds that can be paused. It does not run until it is started."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, 0.0
        self.running = False

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self.running else 0.0)

    def start(self) -> None:
        if not self.running:
            self._since, self.running = time.perf_counter(), True

    def stop(self) -> None:
        self._seconds, self.running = self.seconds, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        running = self.running
        self.stop()
        yield
        if running:
            self.start()


class EmoTrainer(Trainer):
    """A Trainer for a model with an attached objective and one of our collators.

    Each log entry of training also has ``nll``, ``emo`` (where the mode computes it), ``target_prob`` (means over the
    supervised tokens of all ranks since the last entry), ``supervised_tokens_per_s`` (all ranks together, without the first
    step, evaluation and saves) and, at 16 bits on a device of known peak, ``mfu``, this rank's model FLOPs utilisation.
    With packed rows it has ``examples``: how many a step saw, on average since the last entry.
    Evaluation sums over the supervised tokens of all ranks and divides once, so it does not depend on batch size or world
    size. The training set is filled up to whole global batches with fully masked rows,
    which the sampler shuffles in: no example is seen twice or dropped, whatever the world size.

    No update is made of what is not finite, see ``Guard``; a step that is skipped leaves no trace in the log's means. The log
    has ``skipped_steps`` and ``loss_spikes``, both since the run began, once there are any.

    Collectives of its own: one all-reduce of 5 float64 per step (``Guard``: it also carries whether any rank was asked to
    stop), per log entry and per evaluation, of 1 more per entry with packed rows.
    """

    data_collator: Collator
    train_dataset: Any

    def __init__(self, model: PreTrainedModel, *args: Any, record: dict | None = None, stop: Any = False, **kwargs: Any):
        self.record = record or {}  # what manifests say of the run
        self.stop = stop  # true when this process has been asked to stop
        self._saved_at = -1  # the step of the last checkpoint
        self.use_cache = model.config.use_cache  # of who generates with the model; the Trainer turns it off
        super().__init__(model, *args, **kwargs)
        self.emo: AttachedObjective = self.accelerator.unwrap_model(self.model).emo_objective
        self.watch = Stopwatch()
        self.guard = Guard(self.args.device, self.args.world_size, self.args.skip_nonfinite, fp16=self.args.fp16)
        self.guard.stop_requested = lambda: bool(self.stop)
        self._steps = 0  # of this call of train()
        self._tokens: Any = 0  # the targets of its steps, without the first step's
        self._flops: Any = 0.0  # the same of this rank's work
        self._packed = isinstance(self.train_dataset, PackedExamples)
        self._examples: Any = 0  # this rank's, of the steps since the last log entry
        self._logged_steps = 0  # steps at the last log entry
        self._peak = peak_flops() if self.args.bf16 or self.args.fp16 else None
        self._linear, self._quadratic = training_flops(self.model) if self._peak else (0.0, 0.0)
        if isinstance(self.train_dataset, Dataset | PackedExamples):  # a stream has no end to fill up
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            self.train_dataset = fill_up(self.train_dataset, batch, self.data_collator.pad_id)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:  # else accelerate takes it from DeepSpeed's configuration, and warns
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps
        activate_fsdp(self)

    # ---- training ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        if self._steps == 0:
            check_engine(self)
            self._start_guard()
        if self._steps == 1:
            self.watch.start()  # the first step, with its warming up, has ended
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        if self._steps >= 1:
            self._tokens = self._tokens + num_items  # a tensor on the device: no synchronisation here
            if self._peak:
                sums = [count_tokens(sample) for sample in samples]
                self._flops = self._flops + sum(self._linear * n + self._quadratic * squares for n, squares in sums)
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
        again = self._compute_again if isinstance(self.model_wrapped, DistributedDataParallel) else None
        self.guard.start(shards, self.state.stateful_callbacks.get("guard", {}), again)
        if zero is not None:  # whose backward pass makes the update
            stand_before(zero, lambda: self.guard.may_update(self.state.global_step + 1))

    def compute_loss(self, *args: Any, **kwargs: Any):
        loss = super().compute_loss(*args, **kwargs)
        if torch.is_grad_enabled():
            self.guard.watch(loss)
        return loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if not self.accelerator.sync_gradients:  # more micro-batches of this step follow
            return loss
        if not self.is_deepspeed_enabled and not self.guard.may_update(self.state.global_step + 1):
            self._drop_gradients()
        if not self.guard.skipping:
            return loss
        self._tr_loss.copy_(self._loss_before)
        self.emo.train_meter.back()
        self._globalstep_last_logged += 1  # means are over the steps that count
        self._initial_global_step += 1
        return torch.zeros_like(loss)

    def _drop_gradients(self) -> None:
        for parameter in self.model_wrapped.parameters():
            if parameter.grad is not None and self.args.fp16:
                parameter.grad.fill_(math.nan)  # the loss scaler does the skipping
            else:
                parameter.grad = None  # so that an optimizer leaves all as it is, its moments and its decay too
        self._mixed_mesh_grads = None  # which the Trainer would find out from gradients that are not there

    def _compute_again(self) -> None:
        """The gradients of the present step once more, but each rank's own, where DDP has averaged them."""
        model, (samples, num_items) = self.model_wrapped, self._batch
        model.zero_grad()
        with frozen_random_states(), self.accelerator.no_sync(model):
            for inputs in samples:
                super().training_step(model, inputs, num_items)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.args.balance_lengths:  # after accelerate has chosen the sampler, so that the shuffling is the same
            batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)  # of all ranks
            data, args = self.train_dataset, self.args
            lengths = data.row_lengths() if self._packed else example_lengths(data)
            loader.set_sampler(
                BalancedSampler(
                    batches.sampler, lengths, args.train_batch_size, args.world_size, args.gradient_accumulation_steps,
                    padded=isinstance(self.data_collator, PadCollator),
                )
            )  # fmt: skip
        return loader

    def examples_per_step(self) -> float:
        """Examples of all ranks in a step, on average since the last call; one all-reduce of 1 float64."""
        examples = torch.as_tensor(self._examples, dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(examples)
        steps = self._steps - self._logged_steps
        self._examples, self._logged_steps = 0, self._steps
        return float(examples) / steps

    def supervised_tokens_per_s(self) -> float | None:
        """Targets that entered the loss on all ranks per second of training, or None in the first step."""
        return float(self._tokens) / self.watch.seconds if self.watch.seconds > 0 else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.emo.train_meter.drain(self.args.device, over_ranks=self.args.world_size > 1)
            if sums.tokens:
                logs["nll"] = sums.nll / sums.tokens
                if self.emo.teacher is None:  # else exp(-nll) is no probability
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
        if "loss" in logs or "train_loss" in logs:
            logs |= self.guard.counts()
        super().log(logs, start_time)

    # ---- stopping ------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Raises Stopped on all ranks if one was asked to stop, when what was trained is saved."""
        if self.guard.stop_agreed:
            self._leave(*args, **kwargs)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Stopped:  # within an evaluation, which is left
            self._leave(*args, **kwargs)

    def _leave(self, *args: Any, **kwargs: Any) -> None:
        step, saves = self.state.global_step, self.args.save_strategy != SaveStrategy.NO
        self.control.should_evaluate = False
        self.control.should_save = saves and self._saved_at != step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        left = "checkpoint-{} is saved: the same command with --resume auto goes on from it" if saves else "--save_strategy no"
        raise Stopped(f"stopped after step {step}; {left.format(step)}")

    def _anyone_stops(self) -> bool:
        asked = bool(self.stop)
        if self.args.world_size == 1:
            return asked
        anyone = torch.tensor(float(asked), device=self.args.device)
        torch.distributed.all_reduce(anyone)
        return bool(anyone)

    # ---- evaluation ----------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        """Token-weighted: loss, nll, perplexity, target_prob and, with a cost, emo."""
        self.emo.eval_meter.drain("cpu")
        with self.watch.paused(), frozen_random_states():  # a run that is resumed after it is as one that was not
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only=True, metric_key_prefix=metric_key_prefix
            )
            sums = self.emo.eval_meter.drain(self.args.device, over_ranks=self.args.world_size > 1)
        nll = sums.nll / sums.tokens
        metrics = {"loss": sums.loss / sums.tokens, "nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        metrics["target_prob"] = sums.target_prob / sums.tokens
        if self.emo.has_cost:
            metrics["emo"] = sums.emo / sums.tokens
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, output.num_samples)

    def prediction_step(self, *args: Any, **kwargs: Any):
        if self._anyone_stops():
            raise Stopped("stopped in an evaluation; the same command with --resume auto makes up for it")
        return super().prediction_step(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batch = self.args.eval_batch_size * self.args.world_size
        return super().get_eval_dataloader(fill_up(dataset, batch, self.data_collator.pad_id))

    # ---- resuming ------------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None):
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:  # which would load what it finds
            zero.check_model(Path(resume_from_checkpoint), self.model)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        sharded = kind_of(Path(resume_from_checkpoint)) == FSDP  # into any engine but ZeRO
        (fsdp if sharded else plain).load_model(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or kind_of(Path(checkpoint)) != FSDP:
            return super()._load_optimizer_and_scheduler(checkpoint)
        fsdp.load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Those of other ranks than there are now would not fit: then they follow from seed and step."""
        if checkpoint is not None and manifest.read(Path(checkpoint))["world_size"] != self.args.world_size:
            set_seed(self.args.seed + self.state.global_step)
        else:
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    # ---- saving --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A folder checkpoint-N that is whole, on the disk and has a manifest, or none; see ``Staged``."""
        args, step = self.args, self.state.global_step
        target = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with self.watch.paused():
            self.store_flos()
            self.guard.check_weights(step)
            self.state.stateful_callbacks["guard"] = self.guard.state_dict()
            staged = Staged(target, args.process_index, args.world_size, self._bytes_needed())
            folder = str(staged.folder)
            self.model.config.use_cache = self.use_cache
            staged.write(lambda: self.save_model(folder, _internal_call=True))
            self.model.config.use_cache = args.use_cache
            best = target.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            if not args.save_only_model:
                staged.write(lambda: self._save_optimizer_and_scheduler(folder))
                staged.write(lambda: self._save_scaler(folder))
                staged.write(lambda: self._save_rng_state(folder))
            staged.write(lambda: self._save_state(folder))
            staged.commit({"step": step, "world_size": args.world_size, "run": self.record})
            if args.should_save:
                keep_newest(target.parent, args.save_total_limit, self.state.best_model_checkpoint)
        self._saved_at = step

    def _bytes_needed(self) -> int:
        """Of the next checkpoint: as many as the last one had, or at least those of weights and optimizer."""
        try:
            return manifest.size(manifest.checkpoints(Path(str(self.args.output_dir)))[0])
        except (IndexError, ResumeError):
            trained = get_model_param_count(self.model, trainable_only=True)
            return checkpoint_bytes(trained, OptimizerNames(self.args.optim).value, self.args.save_only_model)

    def save_finished(self) -> dict[str, Any]:
        """The finished model into the output folder, when it is whole; what the folder's manifest will say of its files."""
        staged = Staged(Path(str(self.args.output_dir)) / "model", self.args.process_index, self.args.world_size)
        staged.write(lambda: self.save_model(str(staged.folder)))
        return staged.merge()

    def _save_state(self, folder: str) -> None:
        if not self.args.should_save:
            return
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """DeepSpeed's ranks wait for one another within it: one that cannot write goes on, and says so when all are through."""
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        engine, failed = self.model_wrapped.checkpoint_engine, []
        save = engine.save

        def save_or_go_on(*args: Any, **kwargs: Any) -> Any:
            try:
                return save(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failed.append(error)

        engine.save = save_or_go_on
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            engine.save = save
        if failed:
            raise failed[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A plain Hugging Face folder in the masters' dtype (LoRA: peft's) from every engine. Pushed when it is complete.

        A checkpoint whose shards will be saved to resume from has no weights beside them: ``export`` makes them.
        """
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            return super().save_model(output_dir, _internal_call=True)
        adapter = isinstance(self.model, PeftModel)  # small, so it is always whole
        if not _internal_call or self.args.save_only_model or adapter:
            return self._save(output_dir, full_state_dict(self.model, self.args.should_save, trained_only=adapter))
        if self.args.should_save:
            for part in (self.model.config, self.model.generation_config, self.processing_class):
                part.save_pretrained(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nobody here reads
        # ZeRO's model may be in bfloat16, the weights written are the masters; an adapter has no such configuration
        if state_dict and not isinstance(self.model, PeftModel):
            self.model.config.dtype = next(iter(state_dict.values())).dtype
            self.model.config.save_pretrained(folder)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with _hub(f"--hub_model_id {self.args.hub_model_id}: there is no such repository and it cannot be made"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any):
        with _hub(f"--push_to_hub: the model is complete in {self.args.output_dir}, but could not be uploaded"):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """What goes to the hub with the model, unless the output folder has a better one."""
        if not (Path(str(self.args.output_dir)) / "README.md").exists():
            super().create_model_card(*args, **kwargs)


def frozen_random_states():
    """Within it random numbers may be drawn; afterwards it is as if none had been."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextlib.contextmanager
def _hub(message: str) -> Iterator[None]:
    """Makes of what the hub's client raises a UserError: no network, no permission, no space."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{message} ({first_line(error)})") from None
