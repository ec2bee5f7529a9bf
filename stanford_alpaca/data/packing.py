"""Packs several whole examples into one row by best fit, so that little of a row is padding."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset


def example_lengths(examples: Dataset) -> np.ndarray:  # [N] int64
    """Returns the number of tokens of every example.

    Reads the column as Arrow, so no example becomes Python objects.
    """
    batches = examples.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate(
        [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    ).astype(np.int64)


def best_fit(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Packs indices into rows whose lengths add up to at most ``capacity``.

    Each index is in exactly one row. The method is best fit decreasing: the longest example comes
    first, and each goes into the fullest row that has room. The rows are stored by the space that
    they have left. The spaces that occur are the set bits of one integer, so the smallest space
    that fits is its lowest set bit from bit ``length`` on.

    The rows are returned in random order, so that an epoch does not go from long to short. Ties
    are broken by the seed too.

    Raises:
        ValueError: an example has more than ``capacity`` tokens.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an example has {lengths.max()} tokens, a row {capacity}")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    # rows by the number of tokens that still fit
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
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
    """Rows of several examples. A row is put together when it is read; the examples stay on disk.

    A row has the ``input_ids`` and ``labels`` of its examples, one after the other, their
    ``lengths``, and ``weights`` if one of them has weights. Rows without examples fill up the last
    global batch.
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
        """Returns the number of tokens of every row."""
        lengths = example_lengths(self.examples)
        return np.array([lengths[row].sum() for row in self.rows], dtype=np.int64)

    def filled(self, multiple: int) -> "PackedExamples":
        """Appends rows without examples, see ``batching.pad_to_multiple``."""
        return PackedExamples(self.examples, [*self.rows, *([[]] * (-len(self.rows) % multiple))])

    def report(self, capacity: int) -> str:
        """Returns a line that says how many rows there are and how full they are."""
        examples, rows = sum(map(len, self.rows)), len(self.rows)
        full = self.row_lengths().sum() / (rows * capacity)
        return (
            f"packed {examples:,} examples into {rows:,} rows, "
            f"{examples / rows:.2f} to a row, {full:.1%} full"
        )
