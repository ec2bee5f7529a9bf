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
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.import_utils import is_torch_tf32_available

from stanford_alpaca.attach import attach_objective
from stanford_alpaca.cost import COST_KINDS, CostEmbedding
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.formats import FORMS
from stanford_alpaca.data.sources import ExampleStream, Loading, load_source, mix, stream_sources
from stanford_alpaca.data.tokenize import TEMPLATES
from stanford_alpaca.engines import peak_memory_mib
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
    data_path: list[str] = field(metadata={"help": "Files, folders or hub names; see the README's table of forms."})
    data_weights: list[float] | None = field(
        default=None, metadata={"help": "Draws the examples of several --data_path in these proportions."}
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Names of columns in the data, as instruction=question output=answer."}
    )
    prompt_template: str = choice(*TEMPLATES, default="auto", help="alpaca, chat (the tokenizer's), or plain.")
    streaming: bool = field(default=False, metadata={"help": "Reads the data as it is needed; needs --max_steps."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Examples of a stream that are held to be shuffled."})
    eval_path: list[str] | None = field(default=None, metadata={"help": "Held-out data, in the same forms."})
    eval_fraction: float | None = field(default=None, metadata={"help": "Holds out this share of --data_path."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def column_names(self) -> dict[str, str]:
        """--columns as a mapping from our names to those in the files."""
        pairs = [text.partition("=") for text in self.columns or []]
        for ours, equals, theirs in pairs:
            if not (ours and equals and theirs):
                raise UserError(f"--columns {ours}{equals}{theirs}: write OURS=THEIRS, as instruction=question")
            known = [
                *dict.fromkeys(name for features in FORMS.values() for name in features),
                "conversations",
                "role",
                "content",
            ]
            if ours not in known:
                raise UserError(f"--columns {ours}={theirs}: {ours} is no column of ours{nearest(ours, known)}")
        return {ours: theirs for ours, _, theirs in pairs}


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
    check_data(data, training)
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
    deepspeed = getattr(training, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.is_zero3():
        raise UserError("--deepspeed with ZeRO-3 is not supported yet: use ds_configs/zero2.json or --fsdp")
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


def check_data(data: DataArguments, training: TrainingArguments) -> None:
    """Weights that fit the sources, and what a stream needs and cannot have."""
    data.column_names()
    weights = data.data_weights
    if weights is not None and (len(weights) != len(data.data_path) or min(weights) <= 0 or not math.isfinite(sum(weights))):
        raise UserError(f"--data_weights {weights}: give a number above 0 for each of the {len(data.data_path)} --data_path")
    if data.shuffle_buffer < 1:
        raise UserError(f"--shuffle_buffer {data.shuffle_buffer}: give 1 (not shuffled) or more")
    if data.streaming:
        if training.max_steps <= 0:
            raise UserError("--streaming needs --max_steps: a stream has no length to count epochs by")
        if data.eval_fraction is not None:
            raise UserError("--streaming and --eval_fraction exclude each other: hold data out with --eval_path")
        training.accelerator_config.dispatch_batches = False  # every rank reads the stream and takes its part


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

    held_out = mix(load(data.eval_path), None, training.seed) if data.eval_path is not None else None
    if data.streaming:
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


def train(argv: list[str]) -> None:
    """Runs one fine-tuning from its command line to the saved model."""
    model_args, data_args, objective_args, args = parse(argv)
    objective = objective_args.objective()
    check(model_args, data_args, args)
    cost = make_cost(objective_args)

    tokenizer = load_tokenizer(model_args.model_name_or_path, args.model_max_length, args.cache_dir)
    with args.main_process_first(desc="tokenizing"):
        train_examples, eval_examples = load_data(data_args, args, tokenizer)

    model = load_model(model_args.model_name_or_path, args.cache_dir, attn_implementation=model_args.attn_implementation)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and args.model_max_length > positions:
        raise UserError(f"--model_max_length {args.model_max_length} is more than the model's {positions} positions")
    fit_vocabulary(model, tokenizer)
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
    say(f"saved the {str(model.dtype).removeprefix('torch.')} model to {args.output_dir}")


def main() -> None:
    """The command."""
    exit_on_user_error(lambda: train(sys.argv[1:]))


if __name__ == "__main__":
    main()
