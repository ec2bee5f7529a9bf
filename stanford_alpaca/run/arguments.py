"""The flags of a training run."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from stanford_alpaca.console import storable
from stanford_alpaca.cost import COST_KINDS, is_embedding_file
from stanford_alpaca.data.documents import DOCUMENTS
from stanford_alpaca.data.encode import READINGS
from stanford_alpaca.data.formats import parse_columns
from stanford_alpaca.data.templates import TEMPLATES
from stanford_alpaca.distributed.engine import ENGINES
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_packages, choice
from stanford_alpaca.losses.backends.sampling import EPSILON
from stanford_alpaca.losses.functional import BACKENDS, HEAD_GRADIENTS
from stanford_alpaca.losses.objectives import MODES, WEIGHTINGS, Objective
from stanford_alpaca.losses.own import OwnLoss, read_loss
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.models.lora import LORA_EMBEDDINGS
from stanford_alpaca.run.legacy_flags import read_fsdp_config
from stanford_alpaca.training.cost_sharding import COST_SHARDINGS
from stanford_alpaca.training.engines import engine_flags, skip_slow_deepspeed_probes

# No file may hold the values of these flags, least of all one that is pushed to the hub.
SECRET = ("hub_token",)
LESS_IS_BETTER = ("loss", "nll", "emo", "perplexity")
METRICS = (*LESS_IS_BETTER, "target_prob")  # every evaluation reports these


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A Hugging Face folder or a hub name."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Runs the code that the model's (and the teacher's) repository brings along."
        },
    )
    from_config: bool = field(
        default=False,
        metadata={
            "help": "Trains from scratch: the model's configuration and tokenizer, random weights."
        },
    )
    teacher: str | None = field(
        default=None, metadata={"help": "A model whose top k tokens replace the targets."}
    )
    teacher_top_k: int = field(
        default=64, metadata={"help": "Tokens of the teacher's distributions."}
    )


@dataclass
class DataArguments:
    data_path: list[str] = field(
        metadata={"help": "Files, folders or hub names; see docs/data.md."}
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Draws the examples of several --data_path in these proportions."},
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Names of columns in the data, as instruction=question output=answer."},
    )
    prompt_template: str = choice(
        *TEMPLATES, default="auto", help="alpaca, chat (the tokenizer's), or plain."
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": (
                "A Jinja file, another model's folder, or a name among the tokenizer's own: "
                "implies chat."
            )
        },
    )
    special_tokens: str = choice(
        *READINGS,
        default="text",
        help="What names of special tokens in records mean: text, or parse: the tokens.",
    )
    train_history: bool = field(
        default=False, metadata={"help": "Trains the answers of Alpaca's history, too."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Reads the data as it is needed; needs --max_steps."}
    )
    max_record_mib: int = field(
        default=256,
        metadata={"help": "The most MiB of a record, unpacked; a JSON list may have 16 times it."},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Examples of a stream that are held to be shuffled."}
    )
    eval_path: list[str] | None = field(
        default=None, metadata={"help": "Held-out data, in the same forms."}
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Holds out this share of each --data_path."}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": (
                "Several whole examples in a row of --model_max_length tokens; batches count rows."
            )
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": (
                "The examples of a micro-batch in one row without padding, "
                "best with FlashAttention."
            )
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": (
                "Cuts running text into blocks of so many tokens, "
                "which take the place of --model_max_length."
            )
        },
    )
    documents: str = choice(
        *DOCUMENTS,
        default="auto",
        help=(
            "With --block_size: what begins a document, "
            "behind which an end-of-sequence token stands; see docs/continual.md."
        ),
    )
    max_sentences: int | None = field(
        default=None,
        metadata={
            "help": (
                "With --block_size: only the first lines (rows) of each --data_path "
                "that are not blank; 0: all."
            )
        },
    )
    detokenize: bool = field(
        default=False,
        metadata={
            "help": (
                "With --block_size: turns text of word tokens, as WikiText's, into plain text; "
                "sentences with <unk> are left out."
            )
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize."}
    )

    def __post_init__(self) -> None:
        if self.chat_template is not None and self.prompt_template == "auto":
            self.prompt_template = "chat"  # a template that is given is meant to be used

    def column_names(self) -> dict[str, str]:
        """Returns --columns as a mapping from our column names to those in the files."""
        return parse_columns(self.columns or [])


@dataclass
class ObjectiveArguments:
    mode: str = choice(*MODES, default="mle", help="The objective; see docs/objectives.md.")
    loss: str | None = field(
        default=None,
        metadata={
            "help": (
                "FILE.py:NAME, a loss of your own in place of --mode; see docs/own_loss.md. "
                "The file is run."
            )
        },
    )
    cost: str = field(
        default="frozen",
        metadata={
            "help": (
                "frozen, adaptive, a safetensors file with a [V, D] tensor, "
                "or another model of the same vocabulary."
            )
        },
    )
    cost_kind: str = choice(
        *COST_KINDS,
        default="cosine",
        help=(
            "identity: every wrong token costs 1. shuffled: rows permuted among the tokens. "
            "centred: the mean row taken off."
        ),
    )
    cost_seed: int = field(default=0, metadata={"help": "The permutation of --cost_kind shuffled."})
    emo_weighting: str = choice(
        *WEIGHTINGS, default="paper", help="upstream: as in the published LLaMA code."
    )
    emo_ratio_cap: float | None = field(
        default=None, metadata={"help": "Upper bound of nll / emo; EMOLoss uses 3."}
    )
    emo_weight: float = field(default=0.5, metadata={"help": "w of mode mix: (1 - w) nll + w emo."})
    tailr_gamma: float = field(
        default=1e-7,
        metadata={
            "help": (
                "gamma of mode tailr; a token's loss is within 1/1000 of mle's where its "
                "probability is above 1000 gamma."
            )
        },
    )
    tailr_floor: float = field(default=0.2, metadata={"help": "The least weight of mode tailr."})
    mixce_eta: float = field(default=0.5, metadata={"help": "eta of mode mixce."})
    cost_cache_mib: float | None = field(
        default=None,
        metadata={
            "help": (
                "MiB of bfloat16 cost rows kept between steps; "
                "2048 with bf16 or fp16 on a GPU, else 0."
            )
        },
    )
    cost_sharding: str = choice(
        *COST_SHARDINGS,
        default="auto",
        help="Where the frozen costs live; vocab_parallel shards the output layer's loss too.",
    )
    loss_backend: str = choice("auto", *BACKENDS, default="auto", help="How the loss is computed.")
    head_gradient: str = choice(
        *HEAD_GRADIENTS,
        default="exact",
        help="sampled: unbiased gradients of the output layer from few columns, which cost less.",
    )
    head_epsilon: float = field(
        default=EPSILON,
        metadata={"help": "Threshold of sampled gradients; smaller is closer and costs more."},
    )

    @property
    def where_costs_live(self) -> str:
        """The value of --cost_sharding, except that --cost_cache_mib turns auto into replicate.

        Cost rows can only be cached if every rank holds the whole embedding.
        """
        return (
            "replicate"
            if self.cost_sharding == "auto" and self.cost_cache_mib
            else self.cost_sharding
        )

    @property
    def asks_the_model(self) -> bool:
        """Whether the costs come from the model's own output layer, as it is before training."""
        return self.cost == "frozen" and self.cost_kind != "identity"

    @property
    def prices_elsewhere(self) -> bool:
        """Whether --cost names a file or another model."""
        return self.cost not in ("frozen", "adaptive")

    @property
    def cost_is_model(self) -> bool:
        """Whether --cost names a model."""
        return self.prices_elsewhere and not is_embedding_file(self.cost)

    @cached_property
    def own(self) -> OwnLoss | None:
        """The loss that --loss names, or None. Runs its file, once for a run."""
        try:
            return None if self.loss is None else read_loss(self.loss)
        except ValueError as error:
            raise UserError(f"--loss {self.loss}: {error}") from None

    @property
    def name(self) -> str:
        """The mode, or the file and the name of a loss of one's own, without its folder."""
        return self.mode if self.loss is None else Path(self.loss).name

    def objective(self) -> Objective:
        names = [f.name for f in dataclasses.fields(Objective) if f.name != "mode"]
        options = {name: getattr(self, name) for name in names}
        try:
            return Objective(self.own or self.mode, **options)
        except ValueError as error:
            raise UserError(f"--{error}") from None


@dataclass
class LoraArguments:
    lora: bool = field(
        default=False,
        metadata={"help": "Trains a low-rank adapter beside frozen weights (peft's LoRA)."},
    )
    lora_r: int = field(default=8, metadata={"help": "The adapter's rank."})
    lora_alpha: int = field(
        default=16, metadata={"help": "The adapter counts lora_alpha / lora_r times."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "The share of its inputs that the adapter does not see."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Names of linear layers; by default, as by all-linear, all but the output layer."
            )
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of weights that are no layers, as of experts: experts.gate_up_proj."
        },
    )
    lora_embeddings: str = choice(
        *LORA_EMBEDDINGS,
        default="frozen",
        help="Embedding and output layer: lora gives them an adapter, full trains them whole.",
    )
    qlora: bool = field(
        default=False,
        metadata={
            "help": "--lora beside weights in 4 bits (bitsandbytes' NF4, double quantization)."
        },
    )

    def __post_init__(self) -> None:
        self.lora = self.lora or self.qlora

    @property
    def may_grow(self) -> bool:
        """Whether tokens may be added: only if training also updates their embedding rows."""
        return not self.lora or self.lora_embeddings == "full"


# transformers 5.17 has gradient_checkpointing(_kwargs) alone
OLDER_NAMES = not hasattr(transformers.TrainingArguments, "activation_checkpointing")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    engine: str | None = choice(
        *ENGINES,
        default=None,
        help="What trains, by name; without it as launched, --fsdp, --deepspeed.",
    )
    resume: str | None = choice(
        "auto",
        default=None,
        help="auto: goes on from the newest good checkpoint of --output_dir, if there is one.",
    )
    greater_is_better: bool | None = None
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "tensorboard, trackio, wandb, ..."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where the hub's models and data are kept."}
    )
    model_max_length: int = field(
        default=512, metadata={"help": "Tokens per example; longer ones are cut."}
    )
    global_batch: int | None = field(
        default=None,
        metadata={"help": "Examples per optimizer step; sets --gradient_accumulation_steps."},
    )
    balance_lengths: bool = field(
        default=False,
        metadata={
            "help": "Deals a step's examples to processes and micro-batches by length; losses stay."
        },
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts to answer while training: a file, as for generate."},
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Answers them every so many steps, and at the end."}
    )
    sample_max_new_tokens: int = field(
        default=64, metadata={"help": "The most tokens of such an answer."}
    )
    skip_nonfinite: int = field(
        default=0,
        metadata={
            "help": (
                "How many steps whose loss or gradients are NaN or Inf are skipped "
                "before the run ends."
            )
        },
    )
    if OLDER_NAMES:
        activation_checkpointing: bool | None = field(
            default=None,
            metadata={
                "help": "Computes activations again in the backward pass, to save memory.",
                "nargs": "?",
                "const": True,
            },
        )
        activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
            default=None, metadata={"help": "JSON: how, see transformers' documentation."}
        )
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    hub_strategy: str = "end"

    def to_dict(self) -> dict[str, Any]:
        """Returns the flags as trackers get them."""
        return storable(super().to_dict())

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # Without use_cpu, ranks started by torchrun would each train alone.
            self.use_cpu = True
            self.dataloader_pin_memory = False
        given = vars(self)
        self.fsdp, self.deepspeed = engine_flags(self.engine, given["fsdp"], given["deepspeed"])
        if self.deepspeed and "RANK" not in os.environ:
            flag = f"--engine {self.engine}" if self.engine else "--deepspeed"
            raise UserError(
                f"{flag} needs a launcher, also for one process: torchrun --nproc_per_node 1 ..."
            )
        if self.deepspeed:
            check_packages("--engine zero1 to zero3_offload, or --deepspeed,", "deepspeed")
        if self.deepspeed and self.use_cpu:
            skip_slow_deepspeed_probes()
        if self.fsdp:
            config = given["fsdp_config"]
            config = read_fsdp_config(config) if isinstance(config, str) else dict(config or {})
            if str(config.get("version", config.get("fsdp_version", 2))) != "2":
                raise UserError("--fsdp_config version: only FSDP2 is served here; leave it out")
            if str(config.get("cpu_offload")).lower() == "true" and not self.use_cpu:
                # Offloaded gradients are clipped on the CPU.
                self.ddp_backend = "cuda:nccl,cpu:gloo"
            # activate_fsdp in training/fsdp.py applies this setting.
            if given["activation_checkpointing"] and not self.activation_checkpointing_kwargs:
                config["activation_checkpointing"], self.activation_checkpointing = True, False
            self.fsdp_config = config
        if (
            self.global_batch
            and given["gradient_accumulation_steps"] == 1
            and self.per_device_train_batch_size > 0
        ):
            at_once = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
            # DeepSpeed's configuration is filled in from this value.
            self.gradient_accumulation_steps = max(1, self.global_batch // at_once)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LESS_IS_BETTER)
        if OLDER_NAMES:
            self._use_older_names()
        super().__post_init__()
        if self.fsdp:
            # Only rank 0 reads the weights, unless --fsdp_config says otherwise.
            asked = str(self.fsdp_config.get("cpu_ram_efficient_loading", True)).lower()
            self.fsdp_plugin_args["cpu_ram_efficient_loading"] = asked == "true"
            # Checkpoints to resume from are always sharded. Models for users are always plain.
            if not self.save_only_model:
                self.fsdp_plugin_args["state_dict_type"] = "SHARDED_STATE_DICT"

    def _use_older_names(self) -> None:
        for new in ("activation_checkpointing", "activation_checkpointing_kwargs"):
            old = new.replace("activation", "gradient")
            setattr(self, old, getattr(self, new) or getattr(self, old))
            setattr(self, new, getattr(self, old))


def defaults(*flags: type) -> dict[str, Any]:
    """Returns the default value of every flag, in the types that JSON has."""
    fields = [f for cls in flags for f in dataclasses.fields(cls)]
    values = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in fields
    }
    return json.loads(
        json.dumps(
            {
                name: None if value is dataclasses.MISSING else value
                for name, value in values.items()
            }
        )
    )


FLAGS = (ModelArguments, DataArguments, ObjectiveArguments, LoraArguments, TrainingArguments)


@dataclass(frozen=True)
class Run:
    """One run's arguments.

    Attributes:
        flags: the flags that ``run.yaml`` holds. These are all flags of this package that have a
            value, the Trainer's flags that differ from their defaults, and the seed. Secrets are
            left out.
        made_with: the ``made_with`` section of the file that --config names, or {}.
        notes: lines for the user about flags that were translated.
    """

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    lora: LoraArguments
    training: TrainingArguments
    flags: dict[str, Any]
    made_with: dict[str, Any]
    notes: list[str]

    def other(self, name: str) -> ModelSource:
        """Returns the source that reads another model: the teacher, or the one that prices."""
        return ModelSource(name, self.training.cache_dir, self.model.trust_remote_code)

    @cached_property
    def source(self) -> ModelSource:
        """The source that reads the model."""
        model = self.model
        return ModelSource(
            model.model_name_or_path,
            self.training.cache_dir,
            model.trust_remote_code,
            model.attn_implementation,
            model.from_config,
        )
