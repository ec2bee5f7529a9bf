"""Packing: several whole examples in one row, chosen by best fit, so that little of a row is padding."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset


def example_lengths(examples: Dataset) -> np.ndarray:  # [N] int64
    """Tokens of every example, read column-wise: no example becomes Python objects."""
    batches = examples.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate(
        [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    ).astype(np.int64)


def best_fit(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most ``capacity``; each index is in exactly one row.

    Best fit decreasing: the longest first, each into the fullest row that has room. Rows are kept by the space they have left,
    and the spaces that there are as bits of one integer: the smallest that fits is its lowest bit from ``length`` on. The
    rows come in random order, so that an epoch does not go from long to short; ties are broken by the seed too.

    Raises:
        ValueError: an example of more than ``capacity`` tokens.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an example has {lengths.max()} tokens, a row {capacity}")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    with_space: list[list[int]] = [
        [] for _ in range(capacity + 1)
    ]  # rows by the tokens they have left
    spaces = 0  # bit s is set where with_space[s] has a row
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            row, space = len(rows), capacity
            rows.append([])
        rows[row].append(index)
        with_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return [rows[row] for row in random.permutation(len(rows))]


class PackedExamples(torch.utils.data.Dataset):
    """Examples in rows, put together when they are read: the examples stay where they are, on disk.

    Row i has ``input_ids`` and ``labels`` of its examples, one after the other, their ``lengths``, and ``weights`` where one of
    them has some. A row without examples fills up the last global batch.
    """

    def __init__(self, examples: Dataset, rows: list[list[int]]):
        self.examples, self.rows = examples, rows

    @classmethod
    def of(cls, examples: Dataset, capacity: int, seed: int) -> "PackedExamples":
        """Packs examples of at most ``capacity`` tokens."""
        return cls(examples, best_fit(example_lengths(examples), capacity, seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not self.rows[index]:
            return {"input_ids": [], "labels": [], "lengths": []}
        found: dict[str, Any] = self.examples[self.rows[index]]
        joined = {
            name: [token for example in found[name] for token in example]
            for name in ("input_ids", "labels")
        }
        lengths = [len(ids) for ids in found["input_ids"]]
        given = found.get("weights") or []
        if any(given):
            joined["weights"] = [
                w for own, size in zip(given, lengths, strict=True) for w in own or [1.0] * size
            ]
        return joined | {"lengths": lengths}

    def row_lengths(self) -> np.ndarray:  # [R] int64
        """Tokens of every row."""
        lengths = example_lengths(self.examples)
        return np.array([lengths[row].sum() for row in self.rows], dtype=np.int64)

    def filled(self, multiple: int) -> "PackedExamples":
        """With rows without examples at the end, as ``fill_up`` does it."""
        return PackedExamples(self.examples, [*self.rows, *([[]] * (-len(self.rows) % multiple))])

    def report(self, capacity: int) -> str:
        """What packing has done, in a line."""
        examples, rows = sum(map(len, self.rows)), len(self.rows)
        full = self.row_lengths().sum() / (rows * capacity)
        return f"packed {examples:,} examples into {rows:,} rows, {examples / rows:.2f} to a row, {full:.1%} full"
