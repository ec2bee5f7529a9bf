"""Which engines, shardings and batches are compared: every pair of values that can be had together occurs."""

from collections import Counter
from itertools import combinations, product
from typing import NamedTuple


class Combination(NamedTuple):
    """One run that has to equal one process with the same global batch."""

    engine: str
    cost: str  # --cost_sharding
    processes: int
    accumulation: int
    targets: str  # uneven: responses of 1 to 105 words, and rows without a target
    trained: str
    rows: str  # --packing, or padded

    def __str__(self) -> str:
        return " ".join(map(str, self))


DIMENSIONS = (
    ("ddp", "fsdp", "zero1", "zero2", "zero3"),
    ("replicate", "shard", "vocab_parallel"),
    (1, 2, 4),
    (1, 4),
    ("even", "uneven"),
    ("full", "lora"),
    ("padded", "packed"),
)
EXCLUDED = (
    "vocab_parallel with ddp, zero1, zero2 and zero3: only FSDP2 shards by vocabulary",
    "1 process with ddp, shard and vocab_parallel: there is nothing to share",
)


def allowed(c: Combination) -> bool:
    """Whether the training command accepts it."""
    if c.cost == "vocab_parallel" and c.engine != "fsdp":
        return False
    return c.processes > 1 or (c.engine != "ddp" and c.cost == "replicate")


def parts(c: Combination) -> set[tuple]:
    """What a combination covers: its pairs of values, and engine, cost sharding and number of processes together."""
    return {*combinations(enumerate(c), 2), ("together", *c[:3])}


def covering() -> list[Combination]:
    """A few combinations that cover all parts of all allowed ones, chosen greedily and always the same.

    Among those that cover equally much, the one whose parts are rarest so far.
    """
    candidates = [c for c in map(Combination._make, product(*DIMENSIONS)) if allowed(c)]
    missing = set().union(*map(parts, candidates))
    chosen, used = [], Counter[tuple]()
    while missing:
        best = max(
            candidates,
            key=lambda c: (len(parts(c) & missing), -sum(used[part] for part in parts(c))),
        )
        chosen.append(best)
        missing -= parts(best)
        used.update(parts(best))
    return sorted(
        chosen,
        key=lambda c: [values.index(value) for values, value in zip(DIMENSIONS, c, strict=True)],
    )
