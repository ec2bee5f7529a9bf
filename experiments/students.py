"""Trains what ``oracle.py`` needs: a tokenizer, an oracle, the students' start, and the students.

Anything that exists already is not made again.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)
from transformers.utils.logging import disable_progress_bar

from stanford_alpaca import attach_objective
from stanford_alpaca.checkpoint.export import atomic_folder
from stanford_alpaca.data.reading import open_text
from stanford_alpaca.generation.responses import generate_ids, plain_generation
from stanford_alpaca.generation.sampling import Sampling

disable_progress_bar()  # the progress bars of loading and saving
TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-base"
LENGTH, BATCH = 64, 32  # tokens of a sequence, after its first one; sequences of a step
OBJECTIVES = {
    "mle": {"mode": "mle"},
    "emo": {"mode": "emo"},
    "emo2": {"mode": "emo2"},
    "tailr": {"mode": "tailr"},
    # emo without the embedding
    "identity": {"mode": "emo", "cost_kind": "identity"},
    "emd": {"mode": "emd"},
    "mix": {"mode": "mix"},
    "mixce": {"mode": "mixce"},
    "dft": {"mode": "dft"},
}


@dataclass(frozen=True)
class Student:
    """One training run.

    It has an objective, a number of the oracle's sequences, a number of epochs, a learning rate and
    a seed.
    """

    objective: str
    sequences: int
    epochs: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.objective}-{self.sequences}-{self.rate:g}-{self.seed}"


@contextmanager
def counted(out: Path) -> Iterator[None]:
    """Prints what is made, and adds the CPU seconds it took to spent.jsonl beside it."""
    print(f"making {out.parent.name}/{out.name}", flush=True)
    # A killed command leaves a partial folder.
    shutil.rmtree(out.with_name(f"{out.name}.part"), ignore_errors=True)
    began = time.process_time()
    yield
    with (out.parent / "spent.jsonl").open("a") as file:
        file.write(
            json.dumps({"made": out.name, "cpu_seconds": round(time.process_time() - began, 1)})
            + "\n"
        )


def spent(work: Path) -> float:
    """Returns the CPU minutes of everything made in a folder, over all commands."""
    lines = (line for file in work.rglob("spent.jsonl") for line in file.read_text().splitlines())
    return round(sum(json.loads(line)["cpu_seconds"] for line in lines) / 60, 1)


def make_tokenizer(texts: list[Path], vocab_size: int, out: Path) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE on the texts, with the special tokens of data/tiny-base."""
    if not out.exists():
        lines = (line for file in texts for line in open_text(file))
        out.parent.mkdir(parents=True, exist_ok=True)
        with counted(out), atomic_folder(out) as part:
            AutoTokenizer.from_pretrained(TINY).train_new_from_iterator(
                lines, vocab_size
            ).save_pretrained(part)
    return AutoTokenizer.from_pretrained(out)


def sequences_of(texts: list[Path], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Cuts the texts into pieces of LENGTH tokens. Returns [n, 1 + LENGTH] token ids.

    Each piece follows the beginning-of-sequence token.
    """
    pieces = []
    for file in texts:
        ids = np.concatenate(
            tokenizer(list(open_text(file)), add_special_tokens=False, return_tensors="np")[
                "input_ids"
            ]
        )
        pieces.append(
            torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
        )
    rows = torch.cat(pieces)
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], 1)


def pretrain(
    rows: Tensor, shape: tuple[int, int], tokenizer: PreTrainedTokenizerBase, epochs: int, out: Path
) -> None:
    """Trains a Llama of (width, layers) from scratch with cross entropy."""
    if out.exists():
        return
    width, layers = shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(device())
    with counted(out), atomic_folder(out) as part:
        fit(model, rows, "mle", epochs, rate=3e-3, seed=0)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def fit(
    model: LlamaForCausalLM, rows: Tensor, objective: str, epochs: int, rate: float, seed: int
) -> None:
    """Trains the model with AdamW without weight decay.

    The schedule is a cosine with 3 % of warm-up. The seed decides the order of the rows.
    """
    # The costs are computed from the model before training.
    attached = attach_objective(model, **OBJECTIVES[objective])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=order).split(BATCH):
            batch = rows[chosen].to(model.device)
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    attached.detach()
    model.eval()


def sample(folder: Path, count: int, seed: int, out: Path) -> Tensor:
    """Draws sequences from a model, without truncating its distribution.

    Returns [count, 1 + LENGTH] token ids.
    """
    if not out.exists():
        model, tokenizer = load(folder)
        begin, sampling = [tokenizer.bos_token_id], Sampling(LENGTH, temperature=1.0)
        rows: list[list[int]] = []
        with counted(out):
            while len(rows) < count:  # the few that end earlier are left out
                prompts, now = [begin] * min(512, count), seed + len(rows)
                drawn = generate_ids(model, tokenizer, prompts, sampling, batch_size=512, seed=now)
                rows += [
                    begin + ids
                    for ids in drawn
                    if len(ids) == LENGTH and ids[-1] != tokenizer.eos_token_id
                ]
        part = out.with_suffix(".part")
        torch.save(torch.tensor(rows[:count]), part)
        part.replace(out)
    return torch.load(out, weights_only=True)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Loads a model in float32, to evaluate it or to continue training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device()).eval()
    model.generation_config = plain_generation(tokenizer)
    return model, tokenizer


def train(student: Student, work: Path) -> None:
    """Trains a student from work/start on rows of work/corpus.pt.

    Writes work/students/NAME with its nll on work/dev.pt.
    """
    out = work / "students" / student.name
    if out.exists():
        return
    model, tokenizer = load(work / "start")
    corpus, dev = (torch.load(work / f"{name}.pt", weights_only=True) for name in ("corpus", "dev"))
    drawn = torch.randperm(
        len(corpus), generator=torch.Generator().manual_seed(1000 + student.seed)
    )[: student.sequences]
    with counted(out), atomic_folder(out) as part:
        fit(model, corpus[drawn], student.objective, student.epochs, student.rate, student.seed)
        with torch.inference_mode():
            losses = [
                model(input_ids=rows, labels=rows).loss * len(rows)
                for rows in dev.to(device()).split(BATCH)
            ]
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "dev.json").write_text(json.dumps({"dev_nll": sum(losses).item() / len(dev)}))


def device() -> str:
    """Returns the GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
