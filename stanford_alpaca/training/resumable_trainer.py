"""The Hugging Face Trainer with checkpoints that are whole or not there, of any engine, and that stops when it is asked to."""

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

NUMBERS = (  # flags that are numbers of the optimizer or the schedule
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "lr_scheduler_type",
    "lr_scheduler_kwargs", "max_steps", "num_train_epochs",
)  # fmt: skip
HELD = (
    "weight_decay",
    "betas",
    "eps",
)  # of a group of parameters; what else stands there may be an optimizer's state
OWED = "owed evaluation"  # in the state of a run that was stopped


class ResumableTrainer(Trainer):
    """A Trainer that a run can be taken from at any moment, and given back.

    Args:
        record: what the manifests of its checkpoints say of the run.
        stop: true when this process has been asked to stop; asked after every step and every batch of an evaluation.
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
        self.use_cache = getattr(
            model.config, "use_cache", None
        )  # of who generates with it; the Trainer turns it off
        self._saved_at = -1  # the step of the last checkpoint
        super().__init__(model, *args, **kwargs)

    # ---- stopping ------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Raises Stopped on all ranks if one was asked to stop, when what was trained is saved."""
        if self.agreed_to_stop():
            self._leave(*args, **kwargs)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Stopped:  # within an evaluation, which is left
            self._leave(*args, **kwargs)

    def _leave(self, *args: Any, **kwargs: Any) -> None:
        """An evaluation that was due is owed: who goes on makes it first, as it may decide which checkpoint is the best."""
        step, saves, state = (
            self.state.global_step,
            self.args.save_strategy != SaveStrategy.NO,
            self.state,
        )
        ended = state.epoch is not None and math.isclose(
            state.epoch, round(state.epoch)
        )  # an epoch
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
        saved = f"checkpoint-{step} is saved: the same command with --resume auto goes on from it"
        raise Stopped(
            f"stopped after step {step}; {saved if saves else 'nothing is saved (--save_strategy no)'}"
        )

    def agreed_to_stop(self) -> bool:
        """Whether any rank was asked to, the same on all."""
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
            raise Stopped(
                "stopped in an evaluation; the same command with --resume auto makes up for it"
            )
        return super().prediction_step(*args, **kwargs)

    # ---- resuming ------------------------------------------------------------------------------------------------------

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if (
            resume_from_checkpoint is not None and self.is_deepspeed_enabled
        ):  # which would load what it finds
            zero.check_parameters(Path(resume_from_checkpoint), self.model)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if resume_from_checkpoint is not None:
            self._make_up_evaluation(resume_from_checkpoint)
        return prepared

    def _make_up_evaluation(self, checkpoint: str) -> None:
        """The one that a stop has left, see ``_leave``; the checkpoint, which may be saved again, is that of the same step."""
        owed = self.state.stateful_callbacks.pop(OWED, None)
        if owed is None or self.eval_dataset is None:
            return
        self._load_rng_state(checkpoint)
        is_best = self._determine_best_metric(self._evaluate(None, None), None)
        if owed["save"] or (is_best and self.args.save_strategy == SaveStrategy.BEST):
            self._save_checkpoint(self.model, None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if (
            self.state.global_step >= self.state.max_steps
        ):  # a run that is resumed after its last step
            say(
                f"the checkpoint is of step {self.state.global_step} of {self.state.max_steps}: nothing is trained"
            )
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        sharded = kind_of(Path(resume_from_checkpoint)) == FSDP  # into any engine but ZeRO
        (fsdp if sharded else plain).load_model(model or self.model, Path(resume_from_checkpoint))

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
        """Gives the optimizer and the schedule the numbers of this run's flags: the checkpoint brought along those of its own.

        A schedule that is no function of the step keeps what it has come to; its flags cannot change (``record.FIXED``).
        """
        scheduler: Any = getattr(
            self.lr_scheduler, "scheduler", self.lr_scheduler
        )  # accelerate's is around it
        follows_steps, groups = isinstance(scheduler, LambdaLR), self.optimizer.param_groups
        if not self._asked or type(scheduler).__module__.startswith(
            "deepspeed"
        ):  # DeepSpeed's configuration has its own
            changed = [name for name in NUMBERS if self.record.get(name) != before.get(name)]
            if changed:
                raise ResumeError(
                    f"--{changed[0]} has changed, and --deepspeed names an optimizer or a schedule of DeepSpeed's own, which "
                    "goes on with the checkpoint's; give the same command to go on"
                )
            return
        asked = (
            self._asked
            if len(self._asked) == len(groups)
            else [of for of in self._asked if of["size"]]
        )  # DeepSpeed's
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
        """Those of other ranks than there are now would not fit: then they follow from seed and step."""
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
                    f"{best}, the best checkpoint: {found[0]}; without --load_best_model_at_end the last is kept"
                )
            refuse_code(best)

        share_from_rank_0("best", verify if self.args.process_index == 0 else None)
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(str(best))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer would delete all but the best checkpoint also where the last weights are what is to be saved."""
        limit = self.args.save_total_limit
        if not self.args.load_best_model_at_end:
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # ---- saving --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A folder checkpoint-N that is whole, on the disk and has a manifest, or none; see ``Staged``."""
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
        """Of a configuration that has none (its parts have their own), None takes the Trainer's away."""
        if value is None:
            vars(self.model.config).pop("use_cache", None)
        else:
            self.model.config.use_cache = value

    def _bytes_needed(self) -> int:
        """Of the next checkpoint: as many as the last one had, or at least those of weights and optimizer."""
        try:
            return manifest.size(manifest.checkpoints(Path(str(self.args.output_dir)))[0])
        except (IndexError, ResumeError):
            trained = get_model_param_count(self.model, trainable_only=True)
            return checkpoint_bytes(
                trained, OptimizerNames(self.args.optim).value, self.args.save_only_model
            )

    def save_finished(self) -> dict[str, Any]:
        """The finished model into the output folder, when it is whole; what the folder's manifest will say of its files."""
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
        """What an engine would make where its other ranks wait for the one that cannot."""
        if self.is_fsdp_enabled:
            for name in (fsdp.MODEL, fsdp.OPTIMIZER):
                (folder / name).mkdir(exist_ok=True)
        elif self.is_deepspeed_enabled and self.args.should_save:
            (folder / "latest").write_text(
                f"global_step{self.model_wrapped.global_steps}", encoding="utf-8"
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """DeepSpeed's ranks wait for one another within it: one that cannot write goes on, and says so when all are through."""
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
        engine._copy_recovery_script = lambda folder: (
            None
        )  # a script of DeepSpeed's, whose work is that of ``export``
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            files.save = save
            del engine.save_checkpoint, engine._copy_recovery_script
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
            return self._save(
                output_dir, full_state_dict(self.model, self.args.should_save, trained_only=adapter)
            )
        if self.args.should_save:
            for part in (self.model.config, self.model.generation_config, self.processing_class):
                part.save_pretrained(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Without training_args.bin: a pickle that nobody here reads, with the hub's token in it."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        only = (
            {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        )  # but for those that are trained
        model.save_pretrained(folder, state_dict=state_dict, **only)
        if only:
            (folder / "README.md").unlink(
                missing_ok=True
            )  # peft's card: a run writes its own when all else is hashed
            model.generation_config.save_pretrained(folder)  # which peft leaves to the base
        self.processing_class.save_pretrained(folder)
        # ZeRO's model may be in bfloat16, the weights written are the masters; an adapter has no such configuration
        if state_dict and not isinstance(model, PeftModel):
            self.model.config.dtype = next(iter(state_dict.values())).dtype
            self.model.config.save_pretrained(folder)


def _numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer was made with for a group of parameters, and how many there are in it."""
    return {name: group[name] for name in ("lr", *HELD) if name in group} | {
        "size": len(group["params"])
    }
