"""Measures what padding costs and packing saves.

Run ``python -m benchmarks.packing`` in the repository's root. It runs forward and backward of EMO
(frozen cost) over the same made-up examples, batched in different layouts, on a Llama with random
weights. Like Alpaca's, the lengths are log-normal with a mean of about 150 tokens, at most 512. The
last 45 % of each example is supervised. It uses float32 on a CPU and bfloat16 on a GPU. The layouts
take turns, and medians over the rounds are printed.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import fire
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stanford_alpaca.data.balance import balanced_order
from stanford_alpaca.data.batching import PadCollator, SegmentCollator
from stanford_alpaca.data.packing import PackedExamples, example_lengths
from stanford_alpaca.data.tokenize import IGNORE_INDEX
from stanford_alpaca.flags import check_whole, exit_on_user_error, refuse_unknown
from stanford_alpaca.objective.attach import attach_objective
from stanford_alpaca.objective.isolation import find_isolation

MAX_LENGTH, SUPERVISED = 512, 0.45
Batches = list[dict[str, Any]]


def run(
    examples: int = 64,
    batch: int = 4,
    layers: int = 4,
    hidden_size: int = 512,
    vocab_size: int = 32_000,
    rounds: int = 5,
    attention: str = "sdpa",
    **unknown: Any,
) -> None:
    """Prints supervised tokens per second of each layout.

    Args:
        examples: made-up examples.
        batch: examples, or packed rows, of a micro-batch.
        layers, hidden_size, vocab_size: shape of the model.
        rounds: passes of each layout over all examples.
        attention: sdpa, eager or flash_attention_2.
    """
    refuse_unknown(unknown, run)
    for name, value in [
        ("examples", examples),
        ("batch", batch),
        ("layers", layers),
        ("rounds", rounds),
    ]:
        check_whole(name, value, 1)
    data = made_up(examples, vocab_size)
    model = make_model(layers, hidden_size, vocab_size, attention)
    means = find_isolation(model)
    attach_objective(model, "emo")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    layouts = make_layouts(data, batch, means)
    targets = sum(int((example != IGNORE_INDEX).sum()) for example in map(np.array, data["labels"]))
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for index in range(rounds + 1):
        for name, batches in layouts.items():
            took = time_of(partial(one_pass, model, batches, targets))
            if index:  # the first round warms up
                seconds[name].append(took)
    lengths = example_lengths(data)
    print(
        f"{examples} examples of {lengths.mean():.0f} tokens on average, "
        f"{targets / examples:.0f} of them supervised"
    )
    slowest = median(seconds[f"padded to {MAX_LENGTH}"])
    for name, times in seconds.items():
        processed = sum(batch["input_ids"].numel() for batch in layouts[name])
        rate, gain = targets / median(times), slowest / median(times)
        print(
            f"{name}: {rate:.0f} supervised tokens/s, {gain:.2f}x; "
            f"{lengths.sum() / processed:.0%} of its tokens are no padding"
        )


def made_up(count: int, vocab_size: int) -> Dataset:
    """Makes examples of random tokens."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(125), 0.6, count).astype(int).clip(8, MAX_LENGTH)
    ids = [random.integers(3, vocab_size, length) for length in lengths]
    labels = [
        np.where(np.arange(len(row)) < round((1 - SUPERVISED) * len(row)), IGNORE_INDEX, row)
        for row in ids
    ]
    return Dataset.from_dict(
        {"input_ids": [row.tolist() for row in ids], "labels": [row.tolist() for row in labels]}
    )


def make_model(layers: int, hidden_size: int, vocab_size: int, attention: str) -> PreTrainedModel:
    """Makes a Llama with random weights and heads of width 64."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        max_position_embeddings=MAX_LENGTH,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def make_layouts(data: Dataset, batch: int, means: str) -> dict[str, Batches]:
    """Returns the same examples in micro-batches, by the name of the layout."""

    def collated(items, collate: Callable) -> Batches:
        rows = [items[i] for i in range(len(items))]
        return [collate(rows[start : start + batch]) for start in range(0, len(rows), batch)]

    pad = PadCollator(0)
    whole = {"input_ids": [0] * MAX_LENGTH, "labels": [IGNORE_INDEX] * MAX_LENGTH}

    def pad_to_max(items: list[dict]) -> dict:
        return {name: tensor[:-1] for name, tensor in pad([*items, whole]).items()}

    # Only full micro-batches are ordered by length.
    even = data.select(range(len(data) // batch * batch))
    order = [
        *balanced_order(example_lengths(even), batch, ranks=1, padded=True),
        *range(len(even), len(data)),
    ]
    return {
        f"padded to {MAX_LENGTH}": collated(data, pad_to_max),
        "padded to the longest": collated(data, pad),
        "padded to the longest, --balance_lengths": collated(data.select(order), pad),
        "--padding_free": collated(data, SegmentCollator(0, flat=True, apart_by=means)),
        "--packing": collated(
            PackedExamples.of(data, MAX_LENGTH, seed=0), SegmentCollator(0, apart_by=means)
        ),
    }


def one_pass(model: PreTrainedModel, batches: Batches, targets: int) -> None:
    """Runs forward and backward over all micro-batches, as one optimizer step accumulates them."""
    model.zero_grad()
    for batch in batches:
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        model(**inputs, num_items_in_batch=targets).loss.backward()


def time_of(call: Callable[[], None]) -> float:
    """Returns the seconds of a call."""
    began = perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
