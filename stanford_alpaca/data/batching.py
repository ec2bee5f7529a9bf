"""From examples to batches: padding on the right, masked by length, and the rows that fill up the last global batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stanford_alpaca.data.tokenize import IGNORE_INDEX


@dataclass(frozen=True)
class PadCollator:
    """Pads a list of examples to the longest of them.

    Returns int64 tensors [batch, longest]: ``input_ids``, ``labels`` (-100 on padding) and ``attention_mask``. The mask
    follows the lengths, never the padding id, which may equal the end-of-sequence token.
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
        }


def target_counts(examples: Dataset, vocab_size: int) -> Tensor:  # [V] int64
    """How often each token is a target."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in examples.select_columns(["labels"]).with_format("numpy").iter(batch_size=10_000):
        labels = np.concatenate(batch["labels"])
        counts += np.bincount(labels[labels != IGNORE_INDEX], minlength=vocab_size)
    return torch.from_numpy(counts)


def fill_up(examples: Dataset, multiple: int, token_id: int) -> Dataset:
    """Appends fully masked rows until the length divides by ``multiple``, so that no example is seen twice or dropped.

    Such a row is one token without a target: it adds nothing to the loss, its gradient or the count of targets. With
    the global batch as the multiple, every world size sees the same examples in the same step.
    """
    missing = -len(examples) % multiple
    if missing == 0:
        return examples
    filler = Dataset.from_dict(
        {"input_ids": [[token_id]] * missing, "labels": [[IGNORE_INDEX]] * missing}, features=examples.features
    )
    return concatenate_datasets([examples, filler])
