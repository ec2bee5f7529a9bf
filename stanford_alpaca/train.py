"""Supervised fine-tuning.

    python -m stanford_alpaca.train --model_name_or_path M --data_path D --output_dir O

Also ``torchrun --nproc_per_node 4 stanford_alpaca/train.py ...`` and ``--config run.yaml``. The
arguments are those of run/arguments.py and of the Hugging Face TrainingArguments, except for a few
that run/trainer_flags.py refuses.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Run as a file: modules of this folder must not shadow others.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.run_file import MADE_WITH
from stanford_alpaca.checkpoint.saving import write_together
from stanford_alpaca.console import lose_output, say, show, storable
from stanford_alpaca.data.packing import PackedExamples
from stanford_alpaca.data.sources import ExampleStream, examples_digest, identify
from stanford_alpaca.data.templates import IN_WORDS, trained_prompts, use_chat_template
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.distributed.exits import exit_after_barrier, exit_now, is_lost_rank
from stanford_alpaca.distributed.store import load_in_turn, share_from_rank_0
from stanford_alpaca.distributed.weights import loading_whole
from stanford_alpaca.errors import Stopped, UserError, first_line
from stanford_alpaca.flags import exit_on_user_error
from stanford_alpaca.generation.prompts import encode_prompts, read_prompts
from stanford_alpaca.run import summary
from stanford_alpaca.run.arguments import Run
from stanford_alpaca.run.build import cache_costs, make_collator, make_model
from stanford_alpaca.run.data import load_data
from stanford_alpaca.run.environment import check_environment
from stanford_alpaca.run.flag_checks import check
from stanford_alpaca.run.lock import locked
from stanford_alpaca.run.model_card import write_card
from stanford_alpaca.run.model_checks import check_fit
from stanford_alpaca.run.parse import parse
from stanford_alpaca.run.record import LOSS, differences, write_run
from stanford_alpaca.run.resolve import resolve, start_from
from stanford_alpaca.run.signals import StopRequest, ignore_signals
from stanford_alpaca.run.start import Start, where_to_start
from stanford_alpaca.training.callbacks import EvaluateLast, SampleCallback
from stanford_alpaca.training.cost_sharding import shard_cost
from stanford_alpaca.training.hardware import peak_memory_mib
from stanford_alpaca.training.progress import Progress
from stanford_alpaca.training.trainer import EmoTrainer


def train(argv: list[str], recipe: Mapping[str, Any] | None = None) -> None:
    """Runs one fine-tuning, from its command line to the saved model.

    Args:
        argv: the command line.
        recipe: defaults of flags that are not given.
    """
    stop = StopRequest()
    if threading.current_thread() is threading.main_thread():
        stop.install()
    run = parse(argv, recipe)
    for line in run.notes:
        say(line)
    check(run)
    resolve(run)
    with contextlib.ExitStack() as leaving:
        start = find_start(run, leaving)
        for line in start.notes:
            say(line)
        if not start.complete:
            train_from(run, start, stop)


def find_start(run: Run, leaving: contextlib.ExitStack) -> Start:
    """Returns where this run starts. Rank 0 finds it out for all ranks.

    Rank 0 also locks the output folder, until ``leaving`` closes. All ranks raise what it raises.
    """
    args = run.training

    def find() -> Start:
        leaving.enter_context(locked(Path(str(args.output_dir))))
        return where_to_start(run)

    start = share_from_rank_0("start", find if args.process_index == 0 else None)
    start_from(args, start.checkpoint)
    own = run.objective.own
    if own is not None and start.record[MADE_WITH].get(LOSS) != own.digest:
        raise UserError(f"--loss {run.objective.loss}: the file is another one than that of rank 0")
    return start


def load_unchanged(run: Run, start: Start, tokenizer: PreTrainedTokenizerBase) -> tuple:
    """Returns the data, which has to be what the record of this run says that it is."""
    found = load_data(run.data, run.training, tokenizer)
    if run.training.process_index == 0:
        digests = start.record[MADE_WITH]["data"]
        for path in [*run.data.data_path, *(run.data.eval_path or [])]:
            if identify(path, run.data.streaming) != digests[storable(path)]:
                raise UserError(f"{path}: changed while it was read; run the command again")
    return found


def train_from(run: Run, start: Start, stop: StopRequest) -> None:
    """Trains, from the beginning or from a checkpoint, and saves the model."""
    args = run.training
    prompts = (
        read_prompts(args.sample_prompts, None, None) if args.sample_prompts is not None else []
    )
    tokenizer = run.source.tokenizer(args.model_max_length, may_grow=run.lora.may_grow, tell=say)
    use_chat_template(tokenizer, run.data.chat_template, run.model.trust_remote_code)
    check_fit(run, tokenizer, prompts)
    train_examples, eval_examples = load_in_turn(
        lambda: load_unchanged(run, start, tokenizer),
        lambda sets: " ".join(map(examples_digest, sets)),
        args.process_index,
        args.local_process_index,
        args.world_size,
    )
    for line in differences(run, start.record[MADE_WITH]):
        say(f"--config: {line}")
    asking = PromptEncoder(tokenizer)  # encodes prompts as the trained model gets them
    encode_prompts(run.source.config(), asking, prompts, args.sample_max_new_tokens)

    set_seed(args.seed)  # for the random weights of --from_config
    prices = not (run.model.from_config and run.objective.asks_the_model)
    with loading_whole(args):
        model = make_model(run, tokenizer, with_cost=eval_examples is not None and prices)
    sharding = shard_cost(model, run.objective.where_costs_live, args)
    if sharding == "replicate":
        cache_costs(model.emo_objective.cost, run, train_examples)
    collator = make_collator(run, model, tokenizer.pad_token_id)
    if run.data.packing:
        train_examples = PackedExamples.of(train_examples, args.model_max_length, args.seed)
        say(train_examples.report(args.model_max_length))
    trainer = EmoTrainer(
        model=model,
        args=args,
        train_dataset=train_examples,
        eval_dataset=eval_examples,
        data_collator=collator,
        processing_class=tokenizer,
        record=start.record,
        stop=stop,
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(Progress(run.objective.name))
    if eval_examples is not None:
        trainer.add_callback(EvaluateLast())
    if prompts:
        trainer.add_callback(SampleCallback(trainer, prompts))
    write_together(
        Path(str(args.output_dir)),
        args.world_size,
        lambda: write_run(run, start.record) if args.should_save else None,
    )
    count = None if isinstance(train_examples, ExampleStream) else len(train_examples)
    summary.show(run, trainer, sharding, count)
    stop.training = True
    metrics = trainer.train(resume_from_checkpoint=start.checkpoint).metrics
    finish(run, trainer, metrics)


def finish(run: Run, trainer: EmoTrainer, metrics: dict[str, float]) -> None:
    """Saves the model, evaluates it, and writes its metrics, its card and, last, its manifest."""
    args, model, output = run.training, trainer.model, Path(str(run.training.output_dir))
    rate = trainer.supervised_tokens_per_s()
    metrics |= {"train_peak_memory_mib": peak_memory_mib()}
    metrics |= {} if rate is None else {"train_supervised_tokens_per_s": rate}
    trainer.set_use_cache(trainer.use_cache)
    files = trainer.save_finished()
    write_together(output, args.world_size, lambda: trainer.save_metrics("train", metrics))
    evaluation = evaluation_of(trainer) if trainer.eval_dataset is not None else {}

    def write_rest() -> None:
        if evaluation:
            trainer.save_metrics("eval", evaluation)
        trainer.save_state()
        if args.should_save:
            trained = trained_prompts(trainer.processing_class)
            write_card(run, metrics | evaluation, trained and IN_WORDS[trained.template])
            manifest.write(
                output, files, {"step": trainer.state.global_step, "run": trainer.record}
            )

    write_together(output, args.world_size, write_rest)
    if args.push_to_hub:
        trainer.push_to_hub()
    saved = (
        "adapter" if run.lora.lora else f"{str(model.config.dtype).removeprefix('torch.')} model"
    )
    say(f"saved the {saved} to {args.output_dir}")


def evaluation_of(trainer: EmoTrainer) -> dict[str, float]:
    """Returns the evaluation of the final weights: the last ones, or the best checkpoint's.

    Evaluates them now if that has not happened yet. It may not have, because a run that is resumed
    after its last step makes no step to evaluate after.
    """
    state = trainer.state
    step, best = state.global_step, state.best_model_checkpoint
    # The step is read from the folder's name: best_global_step may be a step without a save.
    if trainer.args.load_best_model_at_end and best is not None:
        step = int(best.rpartition("-")[2])
    entries = [
        entry for entry in state.log_history if entry["step"] == step and "eval_loss" in entry
    ]
    return (
        {name: value for name, value in entries[-1].items() if name != "step"}
        if entries
        else trainer.evaluate()
    )


def main(recipe: Mapping[str, Any] | None = None) -> None:
    """Runs the command and ends the process with its exit status."""
    lose_output()
    try:
        status = exit_on_user_error(lambda: run_or_stop(recipe))
    except SystemExit as end:
        if torch.distributed.is_initialized() and isinstance(end.code, int):
            exit_now(end.code)
        raise
    ignore_signals()  # only the end is left
    if torch.distributed.is_initialized():
        exit_after_barrier(status)
    sys.exit(status)


def run_or_stop(recipe: Mapping[str, Any] | None) -> int:
    """Returns the command's exit status. Raises errors with which each rank ends by itself."""
    check_environment()
    try:
        train(sys.argv[1:], recipe)
    except Stopped as stopped:  # all ranks have stopped
        say(f"\n{stopped}")
        return Stopped.status
    except RuntimeError as error:  # errors of gloo and of PyTorch
        if "EADDRINUSE" in str(error):
            port = os.environ.get("MASTER_PORT", "")
            raise UserError(f"MASTER_PORT={port}: the port is in use; choose another") from None
        # rank 0 has ended before all ranks had found each other
        meeting = isinstance(error, torch.distributed.DistError)
        if not ((meeting or torch.distributed.is_initialized()) and is_lost_rank(error)):
            raise
        reason = first_line(error).split(". ")[0]
        show(f"error: rank {os.environ['RANK']} lost another one ({reason})", to_errors=True)
        os._exit(1)  # even if a thread still waits for the other rank
    return 0


if __name__ == "__main__":
    main()
