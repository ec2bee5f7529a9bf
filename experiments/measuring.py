"""Measures how close a student of ``oracle.py`` is to the oracle.

It compares next tokens over the whole vocabulary, and the texts that the student writes.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from experiments.students import LENGTH, counted, load
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.tokenize import IGNORE_INDEX
from stanford_alpaca.evaluation.measures.forced import teacher_forced
from stanford_alpaca.evaluation.measures.mauve import load_featuriser, mauve
from stanford_alpaca.evaluation.measures.oracle import distances, oracle_perplexity
from stanford_alpaca.evaluation.measures.texts import by_themselves
from stanford_alpaca.generation.responses import generate_ids
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.models.load import ModelSource

PREFIX = 16  # tokens of a test sequence that are given, after its first one
POSITIONS = 64  # number of positions at which optimal transport is solved; each seed has its own
CALIBRATION = ("ece", "costly_mass")


def measure(model: Path, here: Path, seed: int, out: Path) -> None:
    """Writes {measure: value} of a model on here/test.pt to the file ``out``.

    Does nothing if the file exists.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with counted(out):
            values = measures_of(model, here, seed)
        part = out.with_suffix(".part")
        part.write_text(json.dumps(values))
        part.replace(out)


def measures_of(model: Path, here: Path, seed: int) -> dict[str, float]:
    """Returns the value of each measure.

    Continuations are drawn from the unmodified model distribution (temperature 1, no truncation),
    one for each test sequence.
    """
    student, tokenizer = load(model)
    oracle, _ = load(here.parent / "oracle")
    start, _ = load(here / "start")
    cost = CostEmbedding(start.lm_head.weight)  # the same for all students
    rows = torch.load(here / "test.pt", weights_only=True)
    examples, pad = _examples(rows), tokenizer.pad_token_id
    forced = teacher_forced(student, tokenizer, examples, cost, batch_size=64).measures()
    found: dict = {"perplexity": forced["perplexity"]}
    found |= distances(
        student,
        oracle,
        examples,
        cost,
        positions=POSITIONS,
        batch_size=64,
        seed=seed,
    )

    prompts = rows[:, : 1 + PREFIX].tolist()
    sampling = Sampling(LENGTH - PREFIX, temperature=1.0)
    drawn = generate_ids(student, tokenizer, prompts, sampling, batch_size=256, seed=seed)
    found["oracle_perplexity"] = oracle_perplexity(
        oracle, prompts, drawn, pad_token_id=pad, batch_size=64
    )
    values = {
        name: items.measured().value
        for name, items in (found | {name: forced[name] for name in CALIBRATION}).items()
    }

    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    features = load_featuriser(ModelSource(str(here.parent / "oracle")))
    written = tokenizer.batch_decode(
        [a + b for a, b in zip(prompts, drawn, strict=True)], skip_special_tokens=True
    )
    truth = tokenizer.batch_decode(rows, skip_special_tokens=True)
    values["mauve"] = mauve(features(truth), features(written), seed=0)
    values |= {
        name: one.measured().value
        for name, one in by_themselves([texts]).items()
        if name in ("distinct_2", "self_bleu")
    }
    return values


def _examples(rows: Tensor) -> Dataset:  # [n, 1 + LENGTH]
    labels = rows.clone()
    labels[:, : 1 + PREFIX] = IGNORE_INDEX
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": labels.tolist()})
