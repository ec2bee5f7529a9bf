"""Supervised fine-tuning: ``python -m stanford_alpaca.train --model_name_or_path M --data_path D --output_dir O``.

Also ``torchrun --nproc_per_node 4 stanford_alpaca/train.py ...`` and ``--config run.yaml``. All arguments of the Hugging Face
TrainingArguments hold, and those of ``arguments.py``.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: our modules must not shadow others'

import os

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from stanford_alpaca.arguments import DataArguments, ObjectiveArguments, Run, TrainingArguments, parse
from stanford_alpaca.attach import attach_objective, routes
from stanford_alpaca.callbacks import EvaluateLast, SampleCallback
from stanford_alpaca.checks import check
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost_sharding import shard_cost
from stanford_alpaca.data.batching import Collator, PadCollator, SegmentCollator, target_counts
from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.formats import check_columns
from stanford_alpaca.data.packing import PackedExamples
from stanford_alpaca.data.sources import ExampleStream, Loading, digest, load_source, mix, stream_sources
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.engines import leave_together, loading_whole, peak_memory_mib
from stanford_alpaca.errors import UserError, exit_on_user_error, say
from stanford_alpaca.generate import encode_prompts, read_prompts
from stanford_alpaca.head import HeadForm
from stanford_alpaca.isolation import find_isolation
from stanford_alpaca.loading import allocate, share_from_rank_0, weights_come_from_rank_0
from stanford_alpaca.model import add_lora, empty_model, fit_vocabulary, load_model, load_tokenizer
from stanford_alpaca.record import differences, made_with, write_card, write_run
from stanford_alpaca.teacher import Teacher, same_vocabulary
from stanford_alpaca.trainer import EmoTrainer
from stanford_alpaca.turns import load_in_turn


def load_data(
    data: DataArguments, training: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | ExampleStream, Dataset | None]:
    """Tokenized training and evaluation examples; the report of each source goes to the terminal."""
    loading = Loading(
        max_length=training.model_max_length, prompt_template=data.prompt_template, columns=data.column_names(),
        cache_dir=training.cache_dir, num_proc=data.preprocessing_num_workers or len(os.sched_getaffinity(0)),
        seed=training.seed, shuffle_buffer=data.shuffle_buffer,
    )  # fmt: skip

    def load(paths: list[str]) -> list[Dataset]:
        sources = []
        for path in paths:
            examples, report = load_source(path, tokenizer, loading)
            say(f"{path}: {report}")
            sources.append(examples)
        return sources

    check_columns([*data.data_path, *(data.eval_path or [])], loading.columns)
    held_out = mix(load(data.eval_path), None, training.seed) if data.eval_path is not None else None
    if data.streaming:
        say("streamed: what is dropped or cut is not counted; python -m stanford_alpaca.preview shows it")
        return stream_sources(data.data_path, data.data_weights, tokenizer, loading), held_out
    sources = load(data.data_path)
    if data.eval_fraction is not None:
        splits = [split(source, data.eval_fraction, training.seed) for source in sources]
        sources, held_out = [kept for kept, _ in splits], mix([held for _, held in splits], None, training.seed)
        say(f"held out {len(held_out):,} examples")
    return mix(sources, data.data_weights, training.seed), held_out


def split(examples: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """What is trained on and what is held out. Raises UserError if either would be empty."""
    if not 0 < round(len(examples) * fraction) < len(examples):
        raise UserError(f"--eval_fraction {fraction} of {len(examples)} examples leaves one side empty")
    parts = examples.train_test_split(test_size=fraction, seed=seed)
    return parts["train"], parts["test"]


def make_cost(args: ObjectiveArguments) -> CostEmbedding | str:
    """What ``attach_objective`` takes as its cost."""
    if args.cost in ("frozen", "adaptive"):
        return args.cost
    if args.cost_kind == "identity":
        raise UserError(f"--cost {args.cost} would not be used: --cost_kind identity needs no embedding")
    try:
        return CostEmbedding.from_file(args.cost, args.cost_kind)
    except Exception as error:  # no such file, no safetensors, no embedding
        raise UserError(
            f"--cost {args.cost}: not frozen, not adaptive, and no embedding in a safetensors file ({error})"
        ) from None


def make_teacher(run: Run, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    """The teacher that --teacher names. Raises UserError for one that does not fit."""
    name, cache_dir = run.model.teacher, run.training.cache_dir
    if name is None:
        return None
    if not same_vocabulary(load_tokenizer(name, cache_dir=cache_dir), tokenizer):
        raise UserError(f"--teacher {name}: its tokenizer has other ids than that of {run.model.model_name_or_path}")
    dtype = torch.bfloat16 if run.training.bf16 else torch.float32
    model = load_model(name, cache_dir, dtype=dtype)
    check_positions(model, "teacher", run.training.model_max_length)
    try:
        return Teacher(model, run.model.teacher_top_k)
    except ValueError as error:
        raise UserError(f"--teacher {name}: {error}") from None


def check_positions(model: PreTrainedModel, name: str, max_length: int) -> None:
    """Raises UserError if examples may have more tokens than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise UserError(f"--model_max_length {max_length} is more than the {name}'s {positions} positions")


def make_model(run: Run, tokenizer: PreTrainedTokenizerBase, with_cost: bool) -> PreTrainedModel:
    """The model with the objective in it. Raises UserError for one that cannot be served.

    Where the engine shards, rank 0 alone has its weights and costs, the others its architecture: one broadcast of the
    configurations and of the form of its head.
    """
    if not weights_come_from_rank_0(run.training):
        return build_model(run, tokenizer, with_cost)
    models = []

    def read() -> tuple:
        models.append(build_model(run, tokenizer, with_cost))
        return models[0].emo_objective.form, models[0].config, models[0].generation_config

    if run.training.process_index == 0:
        share_from_rank_0(read)
        return models[0]
    found: tuple = share_from_rank_0(None)
    form, config, generation_config = found
    model = build_model(run, tokenizer, with_cost, form)
    model.config.update(config.to_dict())
    model.generation_config = generation_config
    allocate(model)  # DeepSpeed takes no meta tensors, and accelerate tells parameters apart by their addresses
    return model


def build_model(run: Run, tokenizer: PreTrainedTokenizerBase, with_cost: bool, form: HeadForm | None = None) -> PreTrainedModel:
    """The model with the objective in it; with a ``form``, on the meta device."""
    model_args, objective_args, training = run.model, run.objective, run.training
    objective, cost = objective_args.objective(), make_cost(objective_args)
    load = load_model if form is None else empty_model
    model = load(
        model_args.model_name_or_path, training.cache_dir,
        from_config=model_args.from_config, attn_implementation=model_args.attn_implementation,
    )  # fmt: skip
    check_positions(model, "model", training.model_max_length)
    added = fit_vocabulary(model, tokenizer)
    if added and run.lora.lora:
        raise UserError(f"--lora trains no embedding, and {added} of the tokenizer's tokens have none: train them without it")
    stops = stop_ids(tokenizer)
    if len(stops) > 1:  # who generates from the folder stops at the end of a turn
        model.generation_config.eos_token_id = stops
    teacher = make_teacher(run, tokenizer)
    try:
        attach_objective(
            model, objective, cost if with_cost or objective.needs_emo else None,
            cost_kind=objective_args.cost_kind, backend=objective_args.loss_backend, teacher=teacher, form=form,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    if run.lora.lora:
        lora = run.lora
        model = add_lora(model, lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules)
    return model


def make_collator(run: Run, model: PreTrainedModel, pad_id: int) -> Collator:
    """Pads and masks, or with --packing and --padding_free neither. Raises UserError for a model that needs the mask.

    Where rank 0 alone has the weights: one broadcast of a word.
    """
    packing, flat = run.data.packing, run.data.padding_free
    if not packing and not flat:
        return PadCollator(pad_id)

    def probe() -> str:
        means = find_isolation(model)
        teacher = model.emo_objective.teacher
        if teacher is not None:
            find_isolation(teacher.model, "teacher", means)
        return means

    if weights_come_from_rank_0(run.training):  # the others have no weights to probe
        means = share_from_rank_0(probe if run.training.process_index == 0 else None)
    else:
        means = probe()
    if routes(model, {}) and not flat:
        raise UserError("--packing: the router's loss of this model would count the padding of rows; add --padding_free")
    return SegmentCollator(pad_id, flat, apart_by=means)


def cache_costs(cost: CostEmbedding | None, run: Run, examples: Dataset | ExampleStream) -> None:
    """Keeps rows of a frozen cost from step to step, within --cost_cache_mib."""
    mib, training = run.objective.cost_cache_mib, run.training
    if mib is None:
        every_step = run.objective.objective().needs_emo and run.model.teacher is None  # else evaluation alone reads rows
        mib = 2048 if every_step and torch.cuda.is_available() and (training.bf16 or training.fp16) else 0
    if cost is None or cost.rows is None or not mib:
        return
    vocab_size, counts = len(cost.rows), None
    if 2 * vocab_size**2 > mib * 2**20 and isinstance(examples, Dataset):  # not all rows: the most frequent targets'
        counts = target_counts(examples, vocab_size)
    try:
        cost.cache(mib, counts)
    except ValueError as error:
        raise UserError(f"--cost_cache_mib: {error}") from None


def train(argv: list[str]) -> None:
    """Runs one fine-tuning from its command line to the saved model."""
    run = parse(argv)
    args = run.training
    for line in run.notes:
        say(line)
    check(run)
    prompts = read_prompts(args.sample_prompts, None, None) if args.sample_prompts is not None else []
    tokenizer = load_tokenizer(run.model.model_name_or_path, args.model_max_length, args.cache_dir, may_grow=not run.lora.lora)
    train_examples, eval_examples = load_in_turn(
        lambda: load_data(run.data, args, tokenizer), lambda sets: " ".join(map(digest, sets)),
        args.process_index, args.local_process_index, args.world_size,
    )  # fmt: skip
    now = made_with(run)
    for line in differences(run, now):
        say(f"--config: {line}")

    set_seed(args.seed)  # for the random weights of --from_config
    prices = not (run.model.from_config and run.objective.asks_the_model)
    with loading_whole(args):
        model = make_model(run, tokenizer, with_cost=eval_examples is not None and prices)
    if shard_cost(model, run.objective.cost_sharding, args) == "replicate":
        cache_costs(model.emo_objective.cost, run, train_examples)
    encode_prompts(model, PromptEncoder(tokenizer, run.data.prompt_template), prompts, args.sample_max_new_tokens)  # all fit?
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
    )
    if eval_examples is not None:
        trainer.add_callback(EvaluateLast())
    if prompts:
        trainer.add_callback(SampleCallback(trainer, prompts, run.data.prompt_template))
    if args.should_save:
        write_run(run, now)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = " rows" if run.data.packing else ""
    say(f"mode {run.objective.mode}, cost {run.objective.cost}, {args.world_size} process(es), global batch {per_step}{rows}")
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    rate = trainer.supervised_tokens_per_s()
    metrics |= {"train_peak_memory_mib": peak_memory_mib()}
    metrics |= {} if rate is None else {"train_supervised_tokens_per_s": rate}
    model.config.use_cache = trainer.use_cache
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    if eval_examples is not None:
        evaluation = evaluation_of(trainer)
        trainer.save_metrics("eval", evaluation)
        metrics |= evaluation
    trainer.save_state()
    if args.should_save:
        write_card(run, metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
    saved = "adapter" if run.lora.lora else f"{str(model.config.dtype).removeprefix('torch.')} model"
    say(f"saved the {saved} to {args.output_dir}")


def evaluation_of(trainer: EmoTrainer) -> dict[str, float]:
    """What evaluation said of the weights that training ended with: the last ones, or those of the best checkpoint.

    Evaluates them now if it has not happened: a run resumed after its last step makes no step to evaluate after.
    """
    state = trainer.state
    step, best = state.global_step, state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best is not None:  # best_global_step may have been a step without a save
        step = int(best.rpartition("-")[2])
    entries = [entry for entry in state.log_history if entry["step"] == step and "eval_loss" in entry]
    return {name: value for name, value in entries[-1].items() if name != "step"} if entries else trainer.evaluate()


def main() -> None:
    """The command."""
    exit_on_user_error(lambda: train(sys.argv[1:]))
    if torch.distributed.is_initialized():
        leave_together()


if __name__ == "__main__":
    main()
