"""The Hugging Face Trainer with checkpoints that are complete or absent, under every engine.

It stops when it is asked to.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from stanford_alpaca.checkpoint import fsdp, manifest, plain, zero
from stanford_alpaca.checkpoint.gather import full_state_dict
from stanford_alpaca.checkpoint.kinds import FSDP, kind_of
from stanford_alpaca.checkpoint.pickles import refuse_code
from stanford_alpaca.checkpoint.saving import Staged, keep_newest
from stanford_alpaca.checkpoint.space import checkpoint_bytes
from stanford_alpaca.console import say
from stanford_alpaca.distributed.store import share_from_rank_0
from stanford_alpaca.errors import ResumeError, Stopped

# flags that set numbers of the optimizer or the schedule
UPDATE_FLAGS = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "max_steps", "num_train_epochs",
)  # fmt: skip
# numbers of a parameter group that follow the flags; its other entries may be optimizer state
HELD = ("weight_decay", "betas", "eps")
OWED = "owed evaluation"  # a key in the state of a run that was stopped


class ResumableTrainer(Trainer):
    """A Trainer that can stop at any step and resume exactly.

    Args:
        record: the run's record, which the manifests of its checkpoints hold.
        stop: true once this process has been asked to stop. It is read after every step and at
            every batch of an evaluation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        record: dict | None = None,
        stop: Any = False,
        **kwargs: Any,
    ):
        self.record, self.stop = record or {}, stop
        # Saved models keep this value, for generation. The Trainer turns it off while it trains.
        self.use_cache = getattr(model.config, "use_cache", None)
        self._saved_at = -1  # the step of the last checkpoint
        super().__init__(model, *args, **kwargs)

    # ---- stopping ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Raises Stopped on all ranks if one was asked to stop, after saving what was trained."""
        if self.agreed_to_stop():
            self._leave(*args, **kwargs)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Stopped:  # raised in an evaluation, which is dropped
            self._leave(*args, **kwargs)

    def _leave(self, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint and raises Stopped.

        If an evaluation was due, the checkpoint says so. A resumed run makes that evaluation first,
        because it may decide which checkpoint is the best.
        """
        step, saves, state = (
            self.state.global_step,
            self.args.save_strategy != SaveStrategy.NO,
            self.state,
        )
        # whether an epoch has ended
        ended = state.epoch is not None and math.isclose(state.epoch, round(state.epoch))
        if self.control.should_evaluate or (
            ended and self.args.eval_strategy == IntervalStrategy.EPOCH
        ):
            due = self.control.should_save or (
                ended and self.args.save_strategy == SaveStrategy.EPOCH
            )
            state.stateful_callbacks[OWED] = {"save": due}
        self.control.should_evaluate = False
        self.control.should_save = saves and self._saved_at != step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.callback_handler.on_train_end(self.args, state, self.control)
        saved = f"checkpoint-{step} is saved: {self._same_command()} goes on from it"
        raise Stopped(
            f"stopped after step {step}; "
            f"{saved if saves else 'nothing is saved (--save_strategy no)'}"
        )

    def _same_command(self) -> str:
        more = "" if self.args.resume == "auto" else " with --resume auto"  # launchers give it
        return f"the same command{more}"

    def agreed_to_stop(self) -> bool:
        """Returns whether any rank was asked to stop; the same on all ranks."""
        return self._anyone_stops()

    def _anyone_stops(self) -> bool:
        asked = bool(self.stop)
        if self.args.world_size == 1:
            return asked
        anyone = torch.tensor(float(asked), device=self.args.device)
        torch.distributed.all_reduce(anyone)
        return bool(anyone)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._anyone_stops():
            raise Stopped(f"stopped in an evaluation; {self._same_command()} makes up for it")
        return super().prediction_step(*args, **kwargs)

    # ---- resuming ----

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        # DeepSpeed would load whatever it finds, so the checkpoint is checked first.
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:
            zero.check_parameters(Path(resume_from_checkpoint), self.model)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if resume_from_checkpoint is not None:
            self._make_up_evaluation(resume_from_checkpoint)
        return prepared

    def _make_up_evaluation(self, checkpoint: str) -> None:
        """Makes the evaluation that a stop has dropped, see ``_leave``.

        It may save the checkpoint again, which is of the same step.
        """
        owed = self.state.stateful_callbacks.pop(OWED, None)
        if owed is None or self.eval_dataset is None:
            return
        self._load_rng_state(checkpoint)
        is_best = self._determine_best_metric(self._evaluate(None, None), None)
        if owed["save"] or (is_best and self.args.save_strategy == SaveStrategy.BEST):
            self._save_checkpoint(self.model, None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run may be resumed after its last step.
        if self.state.global_step >= self.state.max_steps:
            say(
                f"the checkpoint is of step {self.state.global_step} of {self.state.max_steps}: "
                "nothing is trained"
            )
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # FSDP2's shards load into any engine but ZeRO.
        sharded = kind_of(Path(resume_from_checkpoint)) == FSDP
        (fsdp if sharded else plain).restore_model(
            model or self.model, Path(resume_from_checkpoint)
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        self._asked = list(map(_numbers_of, getattr(optimizer, "param_groups", ())))
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or kind_of(Path(checkpoint)) != FSDP:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            fsdp.load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(
                torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            )
        if checkpoint is not None:
            self._hold_to_flags(manifest.read(Path(checkpoint))["run"])

    def _hold_to_flags(self, before: dict[str, Any]) -> None:
        """Gives the optimizer and the schedule the numbers of this run's flags.

        They replace the checkpoint's numbers. A schedule that is no function of the step keeps its
        state, and its flags cannot change (PLATEAU_FLAGS in run/record.py).
        """
        # accelerate wraps the schedule.
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        follows_steps, groups = isinstance(scheduler, LambdaLR), self.optimizer.param_groups
        # An optimizer or a schedule of DeepSpeed's own takes its numbers from its configuration.
        if not self._asked or type(scheduler).__module__.startswith("deepspeed"):
            changed = [name for name in UPDATE_FLAGS if self.record.get(name) != before.get(name)]
            if changed:
                raise ResumeError(
                    f"--{changed[0]} has changed, and --deepspeed names an optimizer or a schedule "
                    "of DeepSpeed's own, which goes on with the checkpoint's; "
                    "give the same command to go on"
                )
            return
        # DeepSpeed's optimizer leaves out groups without parameters.
        asked = (
            self._asked
            if len(self._asked) == len(groups)
            else [of for of in self._asked if of["size"]]
        )
        for group, numbers in zip(groups, asked, strict=True):
            group |= {name: numbers[name] for name in HELD if name in numbers}
        if follows_steps:
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            scheduler.base_lrs = [numbers["lr"] for numbers in asked]
            scheduler._last_lr = [
                base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)
            ]
            for group, base, rate in zip(
                groups, scheduler.base_lrs, scheduler._last_lr, strict=True
            ):
                group |= {"initial_lr": base, "lr": rate}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores the random states.

        If the number of ranks has changed they would not fit, so they follow from seed and step.
        """
        if (
            checkpoint is not None
            and manifest.read(Path(checkpoint))["world_size"] != self.args.world_size
        ):
            set_seed(self.args.seed + self.state.global_step)
        else:
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))

        def verify() -> None:
            found = manifest.problems(best)
            if found:
                raise ResumeError(
                    f"{best}, the best checkpoint: {found[0]}; "
                    "without --load_best_model_at_end the last is kept"
                )
            refuse_code(best)

        share_from_rank_0("best", verify if self.args.process_index == 0 else None)
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(str(best))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps the Trainer from deleting checkpoints, unless the best model is saved.

        With --save_total_limit 1 it would delete all but the best checkpoint, even if the
        last weights are saved.
        """
        limit = self.args.save_total_limit
        if not self.args.load_best_model_at_end:
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a folder checkpoint-N that is complete and on the disk, or none; see ``Staged``."""
        args, step = self.args, self.state.global_step
        target = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self.store_flos()
        staged = Staged(target, args.process_index, args.world_size, self._bytes_needed())
        folder = str(staged.folder)
        self.set_use_cache(self.use_cache)
        staged.write(lambda: self.save_model(folder, _internal_call=True))
        self.set_use_cache(args.use_cache)
        best = target.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == target or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if not args.save_only_model:
            staged.write(lambda: self._prepare_engines_files(staged.folder))
            staged.write(lambda: self._save_optimizer_and_scheduler(folder))
            staged.write(lambda: self._save_scaler(folder))
            staged.write(lambda: self._save_rng_state(folder))
        staged.write(lambda: self._save_state(folder))
        staged.commit({"step": step, "world_size": args.world_size, "run": self.record})
        if args.should_save:
            keep_newest(target, args.save_total_limit, self.state.best_model_checkpoint)
        self._saved_at = step

    def set_use_cache(self, value: bool | None) -> None:
        """Sets ``use_cache`` in the model's configuration.

        None removes the Trainer's value from a configuration that had none of its own. The parts
        of such a configuration have theirs.
        """
        if value is None:
            vars(self.model.config).pop("use_cache", None)
        else:
            self.model.config.use_cache = value

    def _bytes_needed(self) -> int:
        """Returns the size of the next checkpoint: that of the last one.

        Without a last one, returns the least size of the weights and the optimizer state.
        """
        try:
            return manifest.size(manifest.checkpoints(Path(str(self.args.output_dir)))[0])
        except (IndexError, ResumeError):
            trained = get_model_param_count(self.model, trainable_only=True)
            return checkpoint_bytes(
                trained, OptimizerNames(self.args.optim).value, self.args.save_only_model
            )

    def save_finished(self) -> dict[str, Any]:
        """Moves the finished model into the output folder once it is complete.

        Returns:
            What the folder's manifest will say of its files.
        """
        staged = Staged(
            Path(str(self.args.output_dir)) / "model", self.args.process_index, self.args.world_size
        )
        staged.write(lambda: self.save_model(str(staged.folder)))
        return staged.merge()

    def _save_state(self, folder: str) -> None:
        if not self.args.should_save:
            return
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))

    def _prepare_engines_files(self, folder: Path) -> None:
        """Makes folders and files that the engine would otherwise make itself.

        If one rank failed to make them inside the engine, its other ranks would wait for it.
        """
        if self.is_fsdp_enabled:
            for name in (fsdp.MODEL, fsdp.OPTIMIZER):
                (folder / name).mkdir(exist_ok=True)
        elif self.is_deepspeed_enabled and self.args.should_save:
            (folder / "latest").write_text(
                f"global_step{self.model_wrapped.global_steps}", encoding="utf-8"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves the optimizer and the schedule.

        DeepSpeed's ranks wait for one another while they save. So a rank that cannot write goes
        on, and raises its error when all ranks are through.
        """
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        engine, failed = self.model_wrapped, []
        files, save = engine.checkpoint_engine, engine.checkpoint_engine.save

        def save_or_go_on(*args: Any, **kwargs: Any) -> Any:
            try:
                return save(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failed.append(error)

        files.save = save_or_go_on
        engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
        # ``export`` does the work of DeepSpeed's recovery script.
        engine._copy_recovery_script = lambda folder: None
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            files.save = save
            del engine.save_checkpoint, engine._copy_recovery_script
        if failed:
            raise failed[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a plain Hugging Face folder in the masters' dtype (LoRA: peft's) from any engine.

        It is pushed later, when the output folder is complete. A checkpoint with shards to resume
        from gets no plain weights beside them: ``export`` makes them.
        """
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            return super().save_model(output_dir, _internal_call=True)
        # An adapter is small, so it is always saved whole.
        adapter = isinstance(self.model, PeftModel)
        if not _internal_call or self.args.save_only_model or adapter:
            return self._save(
                output_dir, full_state_dict(self.model, self.args.should_save, trained_only=adapter)
            )
        if self.args.should_save:
            for part in (self.model.config, self.model.generation_config, self.processing_class):
                part.save_pretrained(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves the model and the tokenizer, but not training_args.bin.

        That file is a pickle that nobody here reads, and it holds the hub's token.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # peft then saves only those embedding layers that are trained.
        only = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        model.save_pretrained(folder, state_dict=state_dict, **only)
        if only:
            # peft's model card. The run writes its own when all other files are hashed.
            (folder / "README.md").unlink(missing_ok=True)
            model.generation_config.save_pretrained(folder)  # peft does not save it
        self.processing_class.save_pretrained(folder)
        # ZeRO's model may be in bfloat16, but the weights that are written are the masters. An
        # adapter has no configuration of this kind.
        if state_dict and not isinstance(model, PeftModel):
            self.model.config.dtype = next(iter(state_dict.values())).dtype
            self.model.config.save_pretrained(folder)


def _numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers that an optimizer has for a parameter group, and the group's size."""
    return {name: group[name] for name in ("lr", *HELD) if name in group} | {
        "size": len(group["params"])
    }
