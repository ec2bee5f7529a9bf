"""Finds records that occur twice, in one set or in two: exactly, and nearly by MinHash.

Texts are compared in lower case with white space as one space. Two records are near if the sets of
their 5-word shingles have a Jaccard similarity of at least ``NEAR``. MinHash (Broder 1997) with
locality-sensitive hashing, from the package datasketch, proposes pairs, and each is then computed
exactly. So no pair is wrong, and a few that are barely near may be missed.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

NEAR = 0.8  # least Jaccard similarity of near duplicates
WORDS = 5  # words of a shingle
PERMUTATIONS, SEED = 128, 1  # of MinHash

Place = tuple[str, int]  # a source, and a record of it, from 0 on


class Asked(NamedTuple):
    """A record as it is compared."""

    question: str
    answer: str

    @classmethod
    def of(cls, shown: Mapping[str, str]) -> "Asked":
        """Returns a record of ``prompts.as_shown`` in lower case, with single spaces."""
        question = f"{shown['instruction']} {shown['input']}"
        return cls(_plain(question), _plain(shown["reference"]))

    @property
    def text(self) -> str:
        return f"{self.question} {self.answer}".strip()


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


class Duplicates(NamedTuple):
    """Places of records that occur more than once.

    Attributes:
        exact: groups of records with the same question and answer.
        conflicting: groups of records with the same question and at least two answers.
        near: pairs that are near and not exact, with their similarity. None if they were not
            looked for.
    """

    exact: list[list[Place]]
    conflicting: list[list[Place]]
    near: list[tuple[Place, Place, float]] | None

    def overlap(self, held_out: str) -> dict[str, int | None]:
        """Returns how many records of one source are also in others, and how many nearly so."""
        exact = {
            place
            for group in self.exact
            if len({source for source, _ in group}) > 1
            for place in group
            if place[0] == held_out
        }
        if self.near is None:
            return {"exact": len(exact), "near": None}
        near = {
            place
            for one, two, _ in self.near
            if one[0] != two[0]
            for place in (one, two)
            if place[0] == held_out
        }
        return {"exact": len(exact), "near": len(near - exact)}


def find_duplicates(sources: Mapping[str, Sequence[Asked]], near: bool) -> Duplicates:
    """Returns the duplicates within and between sources.

    Args:
        near: whether near duplicates are looked for, which needs datasketch.
    """
    records = {
        (source, number): record
        for source, held in sources.items()
        for number, record in enumerate(held)
        if record.text
    }
    same = _groups(records, lambda record: record)
    asked = _groups(records, lambda record: record.question)
    conflicting = [group for group in asked if len({records[place].answer for place in group}) > 1]
    return Duplicates(same, conflicting, _near(records) if near else None)


def _groups(records: Mapping[Place, Asked], key: Any) -> list[list[Place]]:
    found: dict[Hashable, list[Place]] = defaultdict(list)
    for place, record in records.items():
        found[key(record)].append(place)
    return [group for shared, group in found.items() if len(group) > 1 and shared]


def _near(records: Mapping[Place, Asked]) -> list[tuple[Place, Place, float]]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
    shingles = {place: shingles_of(record.text) for place, record in records.items()}
    found = []
    for place, own in tqdm(shingles.items(), desc="Comparing", disable=None):
        sketch = MinHash(num_perm=PERMUTATIONS, seed=SEED)
        sketch.update_batch(shingle.encode() for shingle in own)
        for other in index.query(sketch):
            similarity = jaccard(own, shingles[other])
            if similarity >= NEAR and records[other] != records[place]:
                found.append((other, place, similarity))
        index.insert(place, sketch)
    return sorted(found, key=lambda pair: -pair[2])


def shingles_of(text: str) -> frozenset[str]:
    """Returns all runs of ``WORDS`` words, or the text itself if it is shorter."""
    words = text.split()
    runs: Iterable[str] = (
        " ".join(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)
    )
    return frozenset(runs) or frozenset({text})


def jaccard(one: frozenset[str], two: frozenset[str]) -> float:
    """Returns the share of common shingles."""
    return len(one & two) / len(one | two)
