"""Supervised fine-tuning: ``python -m stanford_alpaca.train --model_name_or_path M --data_path D --output_dir O``.

Also ``torchrun --nproc_per_node 4 stanford_alpaca/train.py ...``. All arguments of the Hugging Face TrainingArguments hold,
and those of the classes below.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: our modules must not shadow others'

import dataclasses
import math
import os
from dataclasses import dataclass, field

import torch
import transformers
from datasets import Dataset
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.import_utils import is_torch_tf32_available

from stanford_alpaca.attach import attach_objective
from stanford_alpaca.cost import COST_KINDS, CostEmbedding
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.engines import loading_whole, peak_memory_mib
from stanford_alpaca.errors import UserError, check_writable, exit_on_user_error, is_main_process, nearest
from stanford_alpaca.losses.formulas import MODES, WEIGHTINGS, Objective
from stanford_alpaca.losses.linear import BACKENDS
from stanford_alpaca.model import check_model, fit_vocabulary, load_model, load_tokenizer
from stanford_alpaca.old_flags import read_fsdp_config, translate
from stanford_alpaca.trainer import EmoTrainer


def choice(*values: str, default: str, help: str):
    """A dataclass field that takes one of a few words."""
    return field(default=default, metadata={"choices": list(values), "help": help})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A Hugging Face folder or a hub name."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})


@dataclass
class DataArguments:
    data_path: str = field(metadata={"help": "Alpaca-form JSON or JSONL, or a hub name."})
    eval_path: str | None = field(default=None, metadata={"help": "Held-out data, in the same form."})
    eval_fraction: float | None = field(default=None, metadata={"help": "Holds out this share of --data_path."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


@dataclass
class ObjectiveArguments:
    mode: str = choice(*MODES, default="mle", help="The objective; see the README's table of modes.")
    cost: str = field(default="frozen", metadata={"help": "frozen, adaptive, or a safetensors file with a [V, D] tensor."})
    cost_kind: str = choice(*COST_KINDS, default="cosine", help="identity: every wrong token costs 1.")
    emo_weighting: str = choice(*WEIGHTINGS, default="paper", help="upstream: as in the published LLaMA code.")
    emo_ratio_cap: float | None = field(default=None, metadata={"help": "Upper bound of nll / emo; EMOLoss uses 3."})
    emo_weight: float = field(default=0.5, metadata={"help": "w of mode mix: (1 - w) nll + w emo."})
    tailr_gamma: float = field(default=1e-7, metadata={"help": "gamma of mode tailr."})
    tailr_floor: float = field(default=0.2, metadata={"help": "The least weight of mode tailr."})
    mixce_eta: float = field(default=0.5, metadata={"help": "eta of mode mixce."})
    loss_backend: str = choice("auto", *BACKENDS, default="auto", help="How the loss is computed.")

    def objective(self) -> Objective:
        names = [f.name for f in dataclasses.fields(Objective)]
        try:
            return Objective(**{name: getattr(self, name) for name in names})
        except ValueError as error:
            raise UserError(f"--{error}") from None


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = field(default=None, metadata={"help": "Where the hub's models and data are kept."})
    model_max_length: int = field(default=512, metadata={"help": "Tokens per example; longer ones are cut."})
    global_batch: int | None = field(
        default=None, metadata={"help": "Examples per optimizer step; sets --gradient_accumulation_steps."}
    )
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it, the ranks of torchrun would train alone, each for itself
            self.dataloader_pin_memory = False
        config = read_fsdp_config(self.fsdp_config) if self.fsdp and isinstance(self.fsdp_config, str) else {}
        if str(config.get("cpu_offload")).lower() == "true" and not self.use_cpu:
            self.ddp_backend = "cuda:nccl,cpu:gloo"  # gradients are clipped where they lie
        super().__post_init__()


class _Parser(HfArgumentParser):
    def error(self, message: str):  # type: ignore[override]
        raise UserError(message)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments]:
    """The arguments of a run. Raises UserError for anything argparse or Hugging Face rejects."""
    argv, translated = translate(argv, has_tf32=is_torch_tf32_available())
    for line in translated:
        say(line)
    if any(flag.split("=")[0] == "--deepspeed" for flag in argv) and "RANK" not in os.environ:
        raise UserError("--deepspeed needs a launcher, also for one process: torchrun --nproc_per_node 1 ...")
    classes = (ModelArguments, DataArguments, ObjectiveArguments, TrainingArguments)
    parser = _Parser(classes, allow_abbrev=False)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(str(error)) from None
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {name}{nearest(name, flags)}")
    return tuple(parsed)


def check(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """What can be found out before anything is loaded or written."""
    check_output(training)
    check_batches(training)
    has_eval = data.eval_path is not None or data.eval_fraction is not None
    if data.eval_path is not None and data.eval_fraction is not None:
        raise UserError("--eval_path and --eval_fraction exclude each other")
    if data.eval_fraction is not None and not 0 < data.eval_fraction < 1:
        raise UserError(f"--eval_fraction {data.eval_fraction}: give a share between 0 and 1")
    if training.eval_strategy != "no" and not has_eval:
        raise UserError(f"--eval_strategy {training.eval_strategy.value} needs --eval_path or --eval_fraction")
    if not (training.learning_rate > 0 and math.isfinite(training.learning_rate)):
        raise UserError(f"--learning_rate {training.learning_rate}: give a number above 0")
    if training.seed < 0:
        raise UserError(f"--seed {training.seed}: give 0 or more")
    if training.label_smoothing_factor or training.use_liger_kernel or not training.average_tokens_across_devices:
        raise UserError(
            "--label_smoothing_factor, --use_liger_kernel and --average_tokens_across_devices False would train "
            "something else than --mode says: drop them"
        )
    try:
        get_reporting_integration_callbacks(training.report_to)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"--report_to: {error}") from None
    check_model(model.model_name_or_path, training.cache_dir)


def check_output(training: TrainingArguments) -> None:
    """An output folder that can be made, and is new unless a run is resumed from a checkpoint that is there."""
    output, resume = Path(training.output_dir), training.resume_from_checkpoint
    if resume is not None and str(resume).lower() in ("true", "false"):  # Hugging Face's way to say: the newest one
        resume = get_last_checkpoint(output) if str(resume).lower() == "true" and output.is_dir() else None
        if resume is None and str(training.resume_from_checkpoint).lower() == "true":
            raise UserError(f"--resume_from_checkpoint: no checkpoint in {output}")
    if resume is not None and not (Path(resume) / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {resume}: not a checkpoint of a run")
    training.resume_from_checkpoint = resume
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; give a folder")
    if resume is None and output.exists() and any(output.iterdir()):
        raise UserError(f"--output_dir {output} is not empty; give another, or --resume_from_checkpoint")
    check_writable("output_dir", output)


def check_batches(training: TrainingArguments) -> None:
    """Processes that found each other, sizes of at least 1, and the accumulation that makes the global batch."""
    names = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "model_max_length")
    for name in names:
        if getattr(training, name) < 1:
            raise UserError(f"--{name} {getattr(training, name)}: give 1 or more")
    if training.world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(f"launched as {os.environ['WORLD_SIZE']} processes, but {training.world_size} found each other")
    if training.n_gpu > 1:
        raise UserError(f"one process sees {training.n_gpu} GPUs: launch with torchrun, or set CUDA_VISIBLE_DEVICES to one")
    if training.global_batch is not None:
        per_step = training.train_batch_size * training.world_size
        if training.global_batch < 1 or training.global_batch % per_step:
            raise UserError(
                f"--global_batch {training.global_batch} is no multiple of {per_step} "
                f"({training.world_size} processes of {training.train_batch_size})"
            )
        accumulation = training.global_batch // per_step
        if training.gradient_accumulation_steps not in (1, accumulation):
            raise UserError(f"--global_batch {training.global_batch} asks for --gradient_accumulation_steps {accumulation}")
        training.gradient_accumulation_steps = accumulation


def load_data(
    data: DataArguments, training: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """Tokenized training and evaluation examples; the report of each goes to the terminal."""
    sources = {"training": load_records(data.data_path, training.cache_dir)}
    if data.eval_path is not None:
        sources["evaluation"] = load_records(data.eval_path, training.cache_dir)
    elif data.eval_fraction is not None:
        count = len(sources["training"])
        if not 0 < round(count * data.eval_fraction) < count:
            raise UserError(f"--eval_fraction {data.eval_fraction} of {count} records leaves one side empty")
        split = sources["training"].train_test_split(test_size=data.eval_fraction, seed=training.seed)
        sources = {"training": split["train"], "evaluation": split["test"]}
    workers = data.preprocessing_num_workers or len(os.sched_getaffinity(0))
    examples = {}
    for name, records in sources.items():
        examples[name], report = tokenize_records(records, tokenizer, training.model_max_length, workers)
        say(f"{name} data: {report}")
    return examples["training"], examples.get("evaluation")


def say(line: str) -> None:
    """Prints a line once for all ranks."""
    if is_main_process():
        print(line, flush=True)


def make_cost(args: ObjectiveArguments) -> CostEmbedding | str:
    """What ``attach_objective`` takes as its cost."""
    if args.cost in ("frozen", "adaptive"):
        return args.cost
    if args.cost_kind == "identity":
        raise UserError(f"--cost {args.cost} would not be used: --cost_kind identity needs no embedding")
    try:
        return CostEmbedding.from_file(args.cost, args.cost_kind)
    except Exception as error:  # no such file, no safetensors, no embedding
        raise UserError(f"--cost {args.cost}: not frozen, not adaptive, and no safetensors file ({error})") from None


def make_model(model: ModelArguments, training: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with a row for every token, whole and on the CPU of every rank."""
    with loading_whole(training):
        loaded = load_model(model.model_name_or_path, training.cache_dir, attn_implementation=model.attn_implementation)
        positions = getattr(loaded.config, "max_position_embeddings", None)
        if positions is not None and training.model_max_length > positions:
            raise UserError(f"--model_max_length {training.model_max_length} is more than the model's {positions} positions")
        fit_vocabulary(loaded, tokenizer)
    return loaded


def train(argv: list[str]) -> None:
    """Runs one fine-tuning from its command line to the saved model."""
    model_args, data_args, objective_args, args = parse(argv)
    objective = objective_args.objective()
    check(model_args, data_args, args)
    cost = make_cost(objective_args)

    tokenizer = load_tokenizer(model_args.model_name_or_path, args.model_max_length, args.cache_dir)
    with args.main_process_first(desc="tokenizing"):
        train_examples, eval_examples = load_data(data_args, args, tokenizer)

    model = make_model(model_args, args, tokenizer)
    wants_cost = objective.needs_emo or eval_examples is not None
    try:
        attach_objective(
            model, objective, cost if wants_cost else None,
            cost_kind=objective_args.cost_kind, backend=objective_args.loss_backend,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None

    use_cache = model.config.use_cache  # the Trainer turns it off and leaves it so
    trainer = EmoTrainer(
        model=model,
        args=args,
        train_dataset=train_examples,
        eval_dataset=eval_examples,
        data_collator=PadCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    say(f"mode {objective.mode}, cost {objective_args.cost}, {args.world_size} process(es), global batch {per_step}")
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    rate = trainer.supervised_tokens_per_s()
    metrics |= {"train_peak_memory_mib": peak_memory_mib()}
    metrics |= {} if rate is None else {"train_supervised_tokens_per_s": rate}
    model.config.use_cache = use_cache
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    if eval_examples is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    say(f"saved the {str(model.config.dtype).removeprefix('torch.')} model to {args.output_dir}")


def main() -> None:
    """The command."""
    exit_on_user_error(lambda: train(sys.argv[1:]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort the interpreter's end otherwise


if __name__ == "__main__":
    main()
