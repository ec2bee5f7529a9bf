"""One fine-tuning run of ``train.py``'s benchmark.

It runs our command or TRL's SFTTrainer. The same callback counts and times both.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import stanford_alpaca.train as command
from benchmarks.measure import MIB, resident_mib
from benchmarks.traffic import Traffic
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.data.tokenize import IGNORE_INDEX
from stanford_alpaca.errors import UserError
from stanford_alpaca.training.engines import ds_configs
from stanford_alpaca.training.trainer import EmoTrainer
from tests.ranks import run_ranks

LORA, LORA_RATE = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, 2e-4
KEPT_MIB = 4096  # budget of kept cost rows
TRL: dict[str, dict[str, Any]] = {  # settings that differ from TRL's best setup without packing
    "trl": {},
    "trl-packing": {"packing": True},
    "trl-padding_free": {"padding_free": True, "max_length": None},
    "trl-bf16": {"bf16": True},
    # TRL's default: bf16 unless fp16 is set
    "trl-as-shipped": {"bf16": None, "gradient_checkpointing": True},
    "trl-lora": {"learning_rate": LORA_RATE},
}
OURS: dict[str, dict[str, Any]] = {
    "emo": {"mode": "emo"},
    "mle": {"mode": "mle"},
    "emo-packing": {"mode": "emo", "packing": True},
    "emo-padding_free": {"mode": "emo", "padding_free": True},
    "emo-packing-padding_free": {"mode": "emo", "packing": True, "padding_free": True},
    "emo-bf16": {"mode": "emo", "bf16": True},
    "emo-sampled": {"mode": "emo", "head_gradient": "sampled"},
    "emo-sampled-kept": {
        "mode": "emo",
        "head_gradient": "sampled",
        "cost_cache_mib": KEPT_MIB,
    },
    "emo-lora": {"mode": "emo", "lora": True, "learning_rate": LORA_RATE},
    "emo-lora-sampled": {
        "mode": "emo",
        "lora": True,
        "learning_rate": LORA_RATE,
        "head_gradient": "sampled",
        "cost_cache_mib": KEPT_MIB,
    },
}
CONTENDERS = (*TRL, *OURS)
ON_REAL_MODELS = ("trl", "emo", "emo-sampled", "emo-sampled-kept")
ON_REAL_MODELS += ("trl-lora", "emo-lora", "emo-lora-sampled")
ON_RANDOM_MODELS = tuple(
    name for name in CONTENDERS if name in ("trl", "emo") or name not in ON_REAL_MODELS
)
# names in a folder that make_inputs has filled
MODEL, RECORDS, CACHE = "model", "records.json", "cache"


@dataclass(frozen=True)
class Shape:
    """The shape of a random LLaMA, or the folder of a real model."""

    layers: int
    hidden: int
    vocab: int
    model: str = ""

    def config(self, max_length: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            max_position_embeddings=max_length,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


@dataclass(frozen=True)
class Job:
    """What a process trains.

    With ``count`` it runs one more step, in which only the collectives are counted.
    """

    contender: str
    folder: str
    steps: int
    batch: int  # rows on one rank
    max_length: int
    device: str
    threads: int  # threads of one rank
    ranks: int = 1
    engine: str = "none"
    cost_sharding: str = "replicate"
    count: bool = False

    @property
    def all_steps(self) -> int:
        return self.steps + self.count


def make_inputs(
    folder: Path, data: str, records: int, multiple: int, max_length: int, shape: Shape
) -> int:
    """Fills the folder with a model, a tokenizer, and training records.

    A random model's tokenizer is trained on the data. The records are the first ones that are not
    truncated. Their number is a multiple of the global batch, so no batch is padded with repeated
    examples, and TRL and our command see the same examples in the same steps. Returns the number of
    records.
    """
    found = load_records(data)
    rows = [
        {name: row.get(name) or "" for name in ("instruction", "input", "output")} for row in found
    ]
    texts = [format_prompt(row) + row["output"] for row in rows]
    if shape.model:
        (folder / MODEL).symlink_to(Path(shape.model).resolve())
    else:
        make_model(folder / MODEL, texts, shape.config(max_length))
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    whole = [
        row
        for row, text in zip(rows, texts, strict=True)
        if row["output"] and len(tokenizer(text)["input_ids"]) < max_length
    ]
    kept = min(records, len(whole)) // multiple * multiple
    if not kept:
        raise UserError(
            f"--data {data}: {len(whole)} records fit in {max_length} tokens, wanted {multiple} "
            "for one step"
        )
    (folder / RECORDS).write_text(json.dumps(whole[:kept]))
    return kept


def make_model(folder: Path, texts: list[str], config: LlamaConfig) -> None:
    """Writes a random model, and a tokenizer that is trained on the texts."""
    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        texts, vocab_size=config.vocab_size, special_tokens=special, show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# ---- the ruler -----------------------------------------------------------------------------------


class Meter(TrainerCallback):
    """Measures targets, seconds and memory of all steps except the first.

    If the job asks for it, one more step counts the collectives.
    """

    def __init__(self, job: Job):
        self.job, self.step = job, 0
        self.targets: Any = 0
        self.positions = 0  # tokens of the batches, padding included
        self.seconds = self.peak_mib = 0.0
        self.level_mib = self._memory("VmRSS")
        self.counted: dict[str, Any] = {}
        self.traffic = Traffic()
        if job.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak VmHWM

    def begin(self) -> None:
        self.step += 1
        if self.step == 2:
            self._since = self._now()
        if self.step > self.job.steps:
            self.traffic.__enter__()

    def add(self, batches: list[dict[str, Any]]) -> None:
        labels = [batch["labels"][..., 1:] for batch in batches]
        if self.step > self.job.steps:
            ids = torch.cat([part[part != IGNORE_INDEX] for part in labels])
            self.counted = {"targets": len(ids), "unique": sorted(set(ids.tolist()))}
        elif self.step > 1:
            self.targets = self.targets + sum((part != IGNORE_INDEX).sum() for part in labels)
            self.positions += sum(batch["input_ids"].numel() for batch in batches)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if self.step == self.job.steps:
            self.seconds = self._now() - self._since
            self.peak_mib = self._memory("VmHWM") - self.level_mib
        elif self.step > self.job.steps:
            self.traffic.__exit__(None, None, None)
            self.counted |= {"calls": dict(self.traffic.calls), "bytes": dict(self.traffic.bytes)}

    def result(self) -> dict[str, Any]:
        figures = {
            "targets": int(self.targets),
            "positions": self.positions,
            "seconds": self.seconds,
        }
        return figures | {"peak_mib": self.peak_mib, "counted": self.counted}

    def _now(self) -> float:
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _memory(self, entry: str) -> float:
        """Returns the peak of allocated tensors on a GPU, and resident memory on a CPU."""
        if self.job.device == "cuda":
            return torch.cuda.max_memory_allocated() / MIB
        return resident_mib(entry)


class Measured:
    """Mixin that adds a Meter to a trainer and saves nothing."""

    meter: Meter

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(self.meter)  # type: ignore[attr-defined]

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        self.meter.begin()
        batches, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.meter.add(batches)
        return batches, num_items

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        pass


# ---- the contenders ------------------------------------------------------------------------------


def run_everywhere(job: Job) -> list[dict[str, Any]]:
    """Runs the job's ranks and returns what each measured.

    The ranks are forked from a process that has imported everything. They inherit this process's
    environment.
    """
    shutil.rmtree(Path(job.folder) / "out", ignore_errors=True)
    return run_ranks(job.ranks, run_job, job, launched=job.engine != "none")


def run_job(job: Job) -> dict[str, Any]:
    """Trains in this process and returns the figures."""
    torch.set_num_threads(job.threads)
    (run_trl if job.contender in TRL else run_ours)(job, Path(job.folder))
    return Measured.meter.result()


def common(job: Job) -> dict[str, Any]:
    """Returns the Trainer arguments that all contenders share.

    They compute in float32 on a CPU, and with bfloat16 products on a GPU.
    """
    return {
        "output_dir": f"{job.folder}/out",
        "max_steps": job.all_steps,
        "per_device_train_batch_size": job.batch,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "seed": 42,
        "logging_steps": job.all_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": job.device == "cuda",
    }


def run_ours(job: Job, folder: Path) -> None:
    """Runs the command ``python -m stanford_alpaca.train``."""
    Measured.meter = Meter(job)
    command.EmoTrainer = type("MeasuredEmoTrainer", (Measured, EmoTrainer), {})
    places = {
        "model_name_or_path": folder / MODEL,
        "data_path": folder / RECORDS,
        "cache_dir": folder / CACHE,
    }
    flags = (
        common(job)
        | places
        | {"model_max_length": job.max_length, "preprocessing_num_workers": 1, "engine": job.engine}
    )
    flags |= OURS[job.contender] | {"cost_sharding": job.cost_sharding}
    command.train([text for name, value in flags.items() for text in (f"--{name}", str(value))])


def run_trl(job: Job, folder: Path) -> None:
    """Runs SFTTrainer on prompts and completions.

    It uses the settings that make it faster without changing the result.
    """
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    arguments = common(job) | {
        "max_length": job.max_length,
        "completion_only_loss": True,
        "gradient_checkpointing": False,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device != "cpu",
        "ddp_find_unused_parameters": False,
    }
    if job.engine.startswith("zero"):
        arguments["deepspeed"] = str(ds_configs() / f"{job.engine}.json")
    Measured.meter = Meter(job)
    config = SFTConfig(**arguments | TRL[job.contender])
    rows = json.loads((folder / RECORDS).read_text())
    trainer = type("MeasuredSFTTrainer", (Measured, SFTTrainer), {})(
        model=AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": format_prompt(row), "completion": row["output"]} for row in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / MODEL),
        peft_config=LoraConfig(**LORA) if job.contender == "trl-lora" else None,
    )
    trainer.train()
