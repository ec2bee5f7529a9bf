"""Turns examples into batches: padded and masked, or with positions that restart at each example.

Also adds the rows that complete the last global batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stanford_alpaca.data.packing import PackedExamples
from stanford_alpaca.data.tokenize import IGNORE_INDEX


@dataclass(frozen=True)
class PadCollator:
    """Pads a list of examples to the longest of them.

    Returns int64 tensors [batch, longest]: ``input_ids``, ``labels`` (-100 on padding) and
    ``attention_mask``. The mask follows the lengths, never the padding id, which may equal the
    end-of-sequence token. If an example has weights, there are ``token_weights`` too, see
    ``weight_bits``.
    """

    pad_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        def padded(name: str, filler: int) -> Tensor:
            rows = [torch.tensor(example[name]) for example in examples]
            return pad_sequence(rows, batch_first=True, padding_value=filler)

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        } | weight_bits([e.get("weights") or [1.0] * len(e["input_ids"]) for e in examples])


@dataclass(frozen=True)
class SegmentCollator:
    """Makes batches without padding masks, in which each example begins at position 0.

    Takes single examples and packed rows (see ``PackedExamples``). Returns int64 tensors
    [rows, longest], or [1, total] if ``flat``: ``input_ids``, ``labels`` and ``position_ids``;
    and ``use_cache`` False. The labels are -100 at the first token of each example, which nothing
    predicts. A padding token is an example of its own: its position is 0 and no other token
    attends to it.

    Args:
        apart_by: what keeps the examples of a row apart in the model, see
            ``objective.isolation.find_isolation``.
            ``positions``: the positions alone. transformers reads the boundaries from them if
            there is neither a mask nor a cache.
            ``cu_seq_lens``: FlashAttention's inputs for all rows as one sequence. transformers
            makes them from the positions for a single row only.
            ``mask``, ``bias``: a complete mask, for models that make their own without looking at
            the positions. It is bool for SDPA, or float to be added to the attention scores.
    """

    pad_id: int
    flat: bool = False
    apart_by: str = "positions"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [
            _Row(
                e["input_ids"],
                e["labels"],
                e.get("lengths", [size]),
                e.get("weights") or [1.0] * size,
            )
            for e in examples
            for size in [len(e["input_ids"])]
        ]
        if self.flat:
            rows = [_Row(*(list(chain(*parts)) for parts in zip(*rows, strict=True)))]
        width = max(1, *(len(row.input_ids) for row in rows))

        def padded(values: Iterable[list[int]], filler: int) -> Tensor:
            return torch.tensor([row + [filler] * (width - len(row)) for row in values])

        positions = padded(([p for n in row.lengths for p in range(n)] for row in rows), 0)
        labels = padded((row.labels for row in rows), IGNORE_INDEX).masked_fill(
            positions == 0, IGNORE_INDEX
        )
        input_ids = padded((row.input_ids for row in rows), self.pad_id)
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": positions,
            "use_cache": False,
        }
        batch |= weight_bits([row.weights for row in rows])
        if self.apart_by == "cu_seq_lens":
            return batch | flash_attention_inputs(positions)
        if self.apart_by in ("mask", "bias"):
            return batch | {
                "attention_mask": segment_mask(positions, additive=self.apart_by == "bias")
            }
        return batch


Collator = PadCollator | SegmentCollator


class _Row(NamedTuple):
    input_ids: list[int]
    labels: list[int]
    lengths: list[int]
    weights: list[float]


def weight_bits(weights: list[list[float]]) -> dict[str, Tensor]:
    """Returns ``token_weights`` [rows, longest], padded with 1, or nothing if all weights are 1.

    The tensor holds the bits of float32 numbers as int32, because engines that compute in 16 bits
    would round a tensor of floats.
    """
    if all(weight == 1 for row in weights for weight in row):
        return {}
    rows = [torch.tensor(row, dtype=torch.float32) for row in weights]
    return {
        "token_weights": pad_sequence(rows, batch_first=True, padding_value=1.0).view(torch.int32)
    }


def flash_attention_inputs(position_ids: Tensor) -> dict[str, Any]:
    """Returns FlashAttention's inputs for queries and keys, with all rows as one sequence.

    ``cu_seq_lens``: where each example begins, and the total length; int32 [examples + 1].
    ``max_length``: the length of the longest example.
    """
    positions = position_ids.flatten()
    starts = (positions == 0).nonzero().flatten()
    cu_seq_lens = torch.cat([starts, starts.new_tensor([len(positions)])]).int()
    longest = int(cu_seq_lens.diff().max())
    return {
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def segment_mask(position_ids: Tensor, additive: bool) -> Tensor:  # [rows, 1, S, S]
    """Returns the mask in which a token attends to itself and to those before it in its example.

    The mask is bool, or float32 with 0 and -inf if ``additive``.
    """
    example = (position_ids == 0).cumsum(1)
    seen = (example[:, :, None] == example[:, None, :]).tril()[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen


def count_examples(batch: dict[str, Any]) -> Tensor:  # [] int64
    """Counts the examples in a batch of SegmentCollator.

    Each example has at least two tokens. Padding and filler rows only have the position 0.
    """
    return (batch["position_ids"] == 1).sum()


def count_tokens(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the sums of n and n^2 over the examples of a batch, where n is an example's tokens.

    Takes a batch of either collator. Returns float64 tensors and does not wait for the device.
    """
    if "position_ids" not in batch:
        lengths = batch["attention_mask"].sum(1).double()
        return lengths.sum(), (lengths**2).sum()
    positions, examples = batch["position_ids"].double(), count_examples(batch)
    inner = positions > 0
    # n^2 is the sum of 2 p + 1 over an example's positions p = 0 ... n - 1; p = 0 adds 1
    return inner.sum().double() + examples, ((2 * positions + 1) * inner).sum() + examples


def target_counts(examples: Dataset, vocab_size: int) -> Tensor:  # [V] int64
    """Counts how often each token is a target."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in examples.select_columns(["labels"]).with_format("numpy").iter(batch_size=10_000):
        labels = np.concatenate(batch["labels"])
        counts += np.bincount(labels[labels != IGNORE_INDEX], minlength=vocab_size)
    return torch.from_numpy(counts)


def pad_to_multiple(
    examples: Dataset | PackedExamples, multiple: int, token_id: int
) -> Dataset | PackedExamples:
    """Appends fully masked rows until the number of rows is divisible by ``multiple``.

    So no example is seen twice or dropped. Such a row is one token without a target: it adds
    nothing to the loss, its gradient or the count of targets. If ``multiple`` is the global batch
    size, every world size sees the same examples in the same step.
    """
    if isinstance(examples, PackedExamples):
        return examples.filled(multiple)
    missing = -len(examples) % multiple
    if missing == 0:
        return examples
    rows: dict[str, list] = {
        "input_ids": [[token_id]] * missing,
        "labels": [[IGNORE_INDEX]] * missing,
    }
    rows |= {name: [[]] * missing for name in examples.column_names if name not in rows}
    filler = Dataset.from_dict(rows, features=examples.features)
    return concatenate_datasets([examples, filler])
