"""Compares the preflight's estimates with the memory of real runs.

Run ``python -m benchmarks.preflight`` in the repository's root. It trains a random LLaMA for three
steps with each engine, on the CPU in float32, and reads the first rank's peak of resident memory.
Libraries and buffers take memory that does not depend on the model. Therefore the same run of a
very small model is subtracted, and only differences are compared.
"""

import json
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stanford_alpaca.checkpoint.space import MIB
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.flags import exit_on_user_error, refuse_unknown
from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.preflight.estimate import Memory, Setup, peak_memory
from stanford_alpaca.preflight.model_profile import ModelProfile, profile_model

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "data" / "tiny-base"
ENGINES = ("none", "ddp", "fsdp", "zero2", "zero3")
STEPS, RANKS = 3, 2
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# Every large tensor gets a memory mapping of its own, which returns to the system when the tensor
# is freed. So the resident memory is what the run holds.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}


def run(
    engines: Any = ENGINES,
    accumulations: Any = (1, 2),
    mode: str = "emo",
    vocab: int = 32_000,
    hidden: int = 256,
    layers: int = 4,
    batch: int = 8,
    length: int = 512,
    **unknown: Any,
) -> None:
    """Prints a table: engine, accumulation, estimated and measured MiB, the error.

    Lists are given with commas: --engines none,fsdp. ``none`` runs in one process, the others in
    two processes connected by gloo.
    """
    refuse_unknown(unknown, run)
    large = {
        "hidden_size": hidden,
        "intermediate_size": 43 * hidden // 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
    }
    print(
        "| engine | micro-batches | estimated MiB | measured MiB | error |\n|---|---|---|---|---|",
        flush=True,
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            "large": write_model(folder / "large", vocab, large),
            "small": write_model(folder / "small", 2048, SMALL),
        }
        data, share, unique = write_data(folder / "data.json", 2 * RANKS * batch * STEPS, length)
        settings = {
            "priced": Objective(mode).needs_emo,
            "bf16": False,
            "device": "cpu",
            "supervised_share": share,
            "unique_share": unique,
            "cost_cache_mib": 0,
        }
        for engine, accumulation in product(as_list(engines), as_list(accumulations)):
            figures = []
            for size, (rows, tokens) in {"large": (batch, length), "small": (1, 128)}.items():
                ranks = 1 if engine == "none" else RANKS
                setup = Setup(ranks, rows, accumulation, tokens, **settings)
                profile = profile_model(models[size], tokens, "float32")
                out = folder / f"{size}-{engine}-{accumulation}"
                measured = train(folder / size, data, out, engine, mode, setup)
                figures.append((estimate(profile, setup, engine).total / MIB, measured))
            ours, theirs = (more - less for more, less in zip(*figures, strict=True))
            error = f"{ours / theirs - 1:+.0%}"
            line = f"| {engine} | {accumulation} | {ours:.0f} | {theirs:.0f} | {error} |"
            print(line, flush=True)


def estimate(profile: ModelProfile, setup: Setup, engine: str) -> Memory:
    return peak_memory(profile, setup, engine, "replicate" if setup.priced else "-")


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, tuple | list) else [value]


def write_model(folder: Path, vocab: int, fields: dict[str, int]) -> Any:
    """Writes a random LLaMA with the tiny base model's tokenizer. Returns its configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab, tie_word_embeddings=False, max_position_embeddings=4096, **fields
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ModelSource(str(TOKENIZER)).tokenizer().save_pretrained(folder)
    return config


def write_data(file: Path, rows: int, length: int) -> tuple[Path, float, float]:
    """Writes examples that are cut at ``length`` tokens.

    Returns the file, the supervised share of the tokens, and the unique share of the targets.
    """
    words = sorted(
        {
            word
            for record in load_records(str(ROOT / "data/instructions/train.json"))
            for word in record["output"].split()
        }
    )
    draw = random.Random(0)
    records = [
        {"instruction": "Go on.", "output": " ".join(draw.choices(words, k=length))}
        for _ in range(rows)
    ]
    file.write_text(json.dumps(records))
    examples, report = tokenize_records(
        load_records(str(file)), ModelSource(str(TOKENIZER)).tokenizer(), length
    )
    assert report.tokens == rows * length
    targets = [label for labels in examples["labels"][:8] for label in labels if label != -100]
    return file, report.supervised_tokens / report.tokens, len(set(targets)) / len(targets)


def train(model: Path, data: Path, out: Path, engine: str, mode: str, setup: Setup) -> float:
    """Returns the peak resident memory of the first rank in MiB, as training itself reports it."""
    how = {"fsdp": ["--fsdp"]}.get(engine, [])
    if engine.startswith("zero"):
        how = ["--deepspeed", str(ROOT / "ds_configs" / f"{engine}.json")]
    flags = {
        "mode": mode,
        "per_device_train_batch_size": setup.batch,
        "model_max_length": setup.length,
        "gradient_accumulation_steps": setup.accumulation,
    }
    launch = (
        []
        if engine == "none"
        else ["stanford_alpaca.launch", "--standalone", "--nproc_per_node", str(setup.ranks), "-m"]
    )
    command = [
        sys.executable,
        "-m",
        *launch,
        "stanford_alpaca.train",
        "--model_name_or_path",
        str(model),
        "--data_path",
        str(data),
    ]
    command += [
        "--output_dir",
        str(out),
        "--max_steps",
        str(STEPS),
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "True",
        *how,
    ]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((out / "train_results.json").read_text())["train_peak_memory_mib"]


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
