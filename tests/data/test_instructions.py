"""The shipped instruction set: its script makes exactly these files, with the promised sizes.

Nothing that is held out is in the training set.
"""

import json
import runpy
import subprocess
import sys
from collections import Counter

import pytest


@pytest.fixture(scope="module")
def sets(root):
    folder = root / "data" / "instructions"
    return {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("train", "held_out")
    }


def test_sizes_families_and_inputs(sets):
    assert len(sets["train"]) >= 1500 and len(sets["held_out"]) >= 200
    for records in sets.values():
        families = Counter(record["id"].split("/")[0] for record in records)
        assert len(families) >= 8
        assert 0.2 < sum(bool(record["input"]) for record in records) / len(records) < 0.8


def test_nothing_held_out_is_in_the_training_set_in_other_words(sets):
    """The id names the content, whatever the wording.

    Within a family, no held-out answer has the words of a training answer, in any order.
    """
    trained = {record["id"] for record in sets["train"]}
    assert not trained & {record["id"] for record in sets["held_out"]}
    texts = {(record["instruction"], record["input"]) for record in sets["train"]}
    assert not texts & {(record["instruction"], record["input"]) for record in sets["held_out"]}
    answers = {
        (record["id"].split("/")[0], frozenset(record["output"].strip(".").split()))
        for record in sets["train"]
    }
    for record in sets["held_out"]:
        family = record["id"].split("/")[0]
        if family in (
            "synonym",
            "antonym",
            "capital",
            "category",
            "larger",
            "worker",
            "past_tense",
            "replace",
        ):
            assert (family, frozenset(record["output"].strip(".").split())) not in answers, record


def test_held_out_synonyms_are_not_trained_as_replacements(sets):
    def pairs(records, family):
        return {
            frozenset(r["id"].split("/")[1].split("+"))
            for r in records
            if r["id"].startswith(family)
        }

    held = pairs(sets["held_out"], "synonym")
    for replaced in pairs(sets["train"], "replace"):
        assert not any(pair <= replaced for pair in held)


def test_every_content_is_its_own(root, monkeypatch):
    """Every question has one answer.

    No word of the lexicon stands in two synonym pairs, or twice in a family of facts.
    """
    world = runpy.run_path(str(root / "data" / "world.py"))
    for name in ("SYNONYMS", "ANTONYMS", "CAPITALS"):
        counts = Counter(word for pair in world[name] for word in pair)
        assert max(counts.values()) == 1, (name, counts.most_common(1))
    members = Counter(member for listed in world["MEMBERS"].values() for member in listed)
    assert max(members.values()) == 1
    assert max(Counter(does for _, does in world["WORKERS"]).values()) == 1


def test_the_script_makes_exactly_these_files(root, tmp_path):
    script = root / "data" / "make_instructions.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    for name in ("train.json", "held_out.json"):
        assert (tmp_path / name).read_bytes() == (
            root / "data" / "instructions" / name
        ).read_bytes()
