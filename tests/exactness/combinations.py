"""Which combinations of engine, sharding and batch are compared with one process.

Every pair of values that is allowed together occurs in one of them.
"""

from collections import Counter
from itertools import combinations, product
from typing import NamedTuple


class Combination(NamedTuple):
    """One run that must equal a single process with the same global batch."""

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
    """Returns whether the training command accepts the combination."""
    if c.cost == "vocab_parallel" and c.engine != "fsdp":
        return False
    return c.processes > 1 or (c.engine != "ddp" and c.cost == "replicate")


def parts(c: Combination) -> set[tuple]:
    """Returns what a combination covers.

    These are its pairs of values, and its engine, cost sharding and number of processes together.
    """
    return {*combinations(enumerate(c), 2), ("together", *c[:3])}


def covering() -> list[Combination]:
    """Returns a few combinations that cover all parts of all allowed ones.

    The choice is greedy and always the same. Among combinations that cover equally many missing
    parts, it takes the one whose parts are the rarest so far.
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
