"""Measures whole training of a random LLaMA of 1.1 billion parameters beside TRL.

The runs are those of ``benchmarks.train``: the same records, model and callback for all.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig

from benchmarks.gpu.figures import ROOT, Figures, Setting, main

BATCH, LENGTH, STEPS = 8, 1024, 8
CONTENDERS, MORE = ("emo", "trl", "mle"), ("emo-sampled-kept", "emo-packing", "trl-packing")
SHARE_OF_LENGTH = 0.6  # words of a response per token of a row: few rows are cut


@dataclass(frozen=True)
class Trained:
    """What is trained. TinyLlama 1.1B has this shape (arXiv 2401.02385)."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    key_value_heads: int = 4
    vocab: int = 32000
    batch: int = BATCH
    length: int = LENGTH
    steps: int = STEPS

    @property
    def model(self) -> str:  # what benchmarks.train_contenders asks of a shape
        return ""

    def config(self, max_length: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=max_length,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


TOY = Trained(1, 32, 64, 2, 1, 400, batch=2, length=128, steps=2)


def shape_of(setting: Setting) -> Trained:
    return TOY if setting.toy else Trained()


def run(setting: Setting, figures: Figures) -> None:
    """Trains each contender in a process of its own, and adds its rate."""
    from benchmarks.train_contenders import Job, make_inputs, run_everywhere

    shape, device = shape_of(setting), setting.device
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "data.json", shape)
        data = str(folder / "data.json")
        with torch.device(device):  # random numbers for the weights take long on a CPU
            count = make_inputs(folder, data, 512, shape.batch, shape.length, shape)
        print(f"{count} records", flush=True)
        rates: dict[str, float] = {}
        for contender in (*CONTENDERS, *(MORE if setting.all else ())):
            if contender.startswith("trl") and importlib.util.find_spec("trl") is None:
                figures.add(contender, note="left out: trl is not installed")
                continue

            def measure(contender: str = contender) -> None:
                job = Job(contender, name, shape.steps, shape.batch, shape.length, device, 1)
                (found,) = run_everywhere(job)
                found.pop("counted")
                rates[contender] = found["targets"] / found["seconds"]
                unit, raw = "supervised tokens/s", found | asdict(shape)
                figures.add(contender, rates[contender], unit, described(shape, found), raw=raw)

            figures.attempt(contender, measure)
        for contender in rates if "trl" in rates else ():
            figures.add(f"{contender} / trl", rates[contender] / rates["trl"])


def described(shape: Trained, found: dict) -> str:
    """Returns the share of the peak rate, and the memory."""
    from stanford_alpaca.training.hardware import peak_flops

    a, b = flops(shape)
    tokens = found["positions"]
    done = (a * tokens + b * tokens * shape.length) / found["seconds"]
    peak = peak_flops()
    share = f"MFU {100 * done / peak:.1f} %, " if peak else ""
    return f"{share}{done / 1e12:.3g} TFLOP/s, peak {found['peak_mib']:.0f} MiB"


def flops(shape: Trained) -> tuple[float, float]:
    """Returns the coefficients of ``training_flops``, at rows of full length."""
    from transformers import AutoModelForCausalLM

    from stanford_alpaca.training.hardware import training_flops

    with torch.device("meta"):
        return training_flops(AutoModelForCausalLM.from_config(shape.config(shape.length)))


def write_records(file: Path, shape: Trained) -> None:
    """Writes records of the shipped texts, whose responses nearly fill a row."""
    words = shipped_words()
    count = int(SHARE_OF_LENGTH * shape.length) if shape.length > 512 else 12
    records = [
        {"instruction": "Go on.", "output": " ".join(next(words) for _ in range(count))}
        for _ in range(max(64, shape.steps * shape.batch))
    ]
    file.write_text(json.dumps(records))


def shipped_words() -> Iterator[str]:
    """Yields the words of the shipped responses, again and again."""
    while True:
        for record in json.loads((ROOT / "data/instructions/train.json").read_text()):
            yield from record["output"].split()


if __name__ == "__main__":
    main(run)
