"""Callbacks of a run: sample answers to a few prompts, and an evaluation after the last step."""

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import IntervalStrategy, TrainerCallback

from stanford_alpaca.checkpoint.saving import write_together
from stanford_alpaca.console import say
from stanford_alpaca.distributed.engine import deepspeed_of, shards_weights
from stanford_alpaca.generation.responses import generate_batch, plain_generation
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.generation.writers import (
    append_jsonl,
    format_sample,
    sample_of,
    samples_as_markdown,
)
from stanford_alpaca.training.trainer import EmoTrainer, preserved_rng


class SampleCallback(TrainerCallback):
    """Answers prompts greedily before the first step (not under ZeRO-3), every ``sample_steps``
    steps, and after the last one.

    The answers go to the terminal, to OUTPUT_DIR/samples.jsonl and to the trackers. Every rank
    takes part, because a sharded model needs all of them. Training is not affected: afterwards the
    random states, the model's mode and the clock are as before.
    """

    def __init__(self, trainer: EmoTrainer, prompts: list[dict]):
        self.trainer, self.prompts = trainer, prompts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # ZeRO-3 gathers no weights before its first step.
        zero3 = deepspeed_of(args) is not None and shards_weights(args)
        if state.global_step == 0 and not zero3:
            self.sample(0)  # what there is to compare with

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step == state.max_steps or (args.sample_steps and step % args.sample_steps == 0):
            self.sample(step)

    def sample(self, step: int) -> None:
        args, model = self.trainer.args, self.trainer.model
        training, generation_config = model.training, model.generation_config
        model.generation_config = plain_generation(self.trainer.processing_class)
        with self.trainer.watch.paused(), preserved_rng():
            texts = generate_batch(
                model,
                self.trainer.processing_class,
                self.prompts,
                Sampling(args.sample_max_new_tokens),
                synced=args.world_size > 1,
            )
        for part in model.modules():  # the outermost stays gathered after a forward pass
            if isinstance(part, FSDPModule):
                part.reshard()
        model.train(training)
        model.generation_config = generation_config
        samples = [
            sample_of(record, {f"step {step}": text})
            for record, text in zip(self.prompts, texts, strict=True)
        ]
        file, first = Path(args.output_dir) / "samples.jsonl", self.trainer.is_world_process_zero()
        lines = [{"step": step, **sample} for sample in samples]
        write_together(file, args.world_size, lambda: append_jsonl(file, lines) if first else None)
        if not first:
            return
        for sample in samples:
            say(format_sample(sample))
        for callback in self.trainer.callback_handler.callbacks:
            _track(callback, samples, step)


class EvaluateLast(TrainerCallback):
    """Evaluates after the last step, while the trackers still listen.

    With --eval_strategy epoch, the end of the epoch does this.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True


def _track(callback: TrainerCallback, samples: list[dict], step: int) -> None:
    """Sends samples to one of the Trainer's trackers, if it can show text."""
    name = type(callback).__name__
    if name == "TensorBoardCallback" and callback.tb_writer is not None:
        callback.tb_writer.add_text("samples", samples_as_markdown(samples), step)
    elif name in ("WandbCallback", "TrackioCallback"):
        tracker = callback._wandb if name == "WandbCallback" else callback._trackio
        rows = [
            [step, s["instruction"], s["input"], text]
            for s in samples
            for text in s["responses"].values()
        ]
        names = ["step", "instruction", "input", "response"]
        if name == "WandbCallback":
            tracker.log({"samples": tracker.Table(columns=names, data=rows)}, commit=False)
        else:
            import pandas

            tracker.log({"samples": tracker.Table(dataframe=pandas.DataFrame(rows, columns=names))})
