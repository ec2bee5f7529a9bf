"""From examples to batches: padded and masked, or with positions that restart; what fills up the last global batch."""

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

    Returns int64 tensors [batch, longest]: ``input_ids``, ``labels`` (-100 on padding) and ``attention_mask``. The mask
    follows the lengths, never the padding id, which may equal the end-of-sequence token. Where an example has weights there are
    ``token_weights`` too, see ``weight_bits``.
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
    """Batches without padding masks, in which positions that start again at 0 tell where an example begins.

    Takes examples and rows of several (see ``PackedExamples``). Returns int64 tensors [rows, longest], or [1, total] if
    ``flat``: ``input_ids``, ``labels`` (-100 at the first token of each example, which nothing predicts) and ``position_ids``;
    and ``use_cache`` False. A padding token is an example of its own: its position is 0 and nothing sees it.

    Args:
        apart_by: what the model keeps examples apart by, see ``find_isolation``. ``positions``: transformers reads them where
            there is neither a mask nor a cache. ``cu_seq_lens``: FlashAttention's inputs for the rows as one sequence; from
            positions transformers makes them for a single row only. ``mask``, ``bias``: a mask that is complete, bool for
            SDPA or float to be added, for models that make theirs without asking for positions.
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
    """``token_weights`` [rows, longest], filled up with 1, unless all are 1: the bits of float32 as int32, since engines that
    compute in 16 bits round what is a number."""
    if all(weight == 1 for row in weights for weight in row):
        return {}
    rows = [torch.tensor(row, dtype=torch.float32) for row in weights]
    return {
        "token_weights": pad_sequence(rows, batch_first=True, padding_value=1.0).view(torch.int32)
    }


def flash_attention_inputs(position_ids: Tensor) -> dict[str, Any]:
    """Where examples begin in the rows put one after the other, int32 [examples + 1], and the longest: for queries and keys."""
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


def segment_mask(
    position_ids: Tensor, additive: bool
) -> Tensor:  # [rows, 1, S, S] bool, or float32: 0 and -inf
    """Who sees whom: the tokens of an example those before them, and every token itself."""
    example = (position_ids == 0).cumsum(1)
    seen = (example[:, :, None] == example[:, None, :]).tril()[:, None]
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen


def count_examples(batch: dict[str, Any]) -> Tensor:  # [] int64
    """The examples in a batch of SegmentCollator: each has two tokens or more, padding and fillers have the position 0 only."""
    return (batch["position_ids"] == 1).sum()


def count_tokens(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sums of n and n^2 over the examples of n tokens in a batch of either collator, float64, without synchronisation."""
    if "position_ids" not in batch:
        lengths = batch["attention_mask"].sum(1).double()
        return lengths.sum(), (lengths**2).sum()
    positions, examples = batch["position_ids"].double(), count_examples(batch)
    inner = positions > 0
    return inner.sum().double() + examples, (
        (2 * positions + 1) * inner
    ).sum() + examples  # n^2 is the sum of 2 p + 1


def target_counts(examples: Dataset, vocab_size: int) -> Tensor:  # [V] int64
    """How often each token is a target."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in examples.select_columns(["labels"]).with_format("numpy").iter(batch_size=10_000):
        labels = np.concatenate(batch["labels"])
        counts += np.bincount(labels[labels != IGNORE_INDEX], minlength=vocab_size)
    return torch.from_numpy(counts)


def pad_to_multiple(
    examples: Dataset | PackedExamples, multiple: int, token_id: int
) -> Dataset | PackedExamples:
    """Appends fully masked rows until the length divides by ``multiple``, so that no example is seen twice or dropped.

    Such a row is one token without a target: it adds nothing to the loss, its gradient or the count of targets. With
    the global batch as the multiple, every world size sees the same examples in the same step.
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
