"""Tests the benchmark of full training.

It counts the same targets for TRL and for us. Its traffic figures are what ranks received.
"""

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.train import run
from benchmarks.train_contenders import MODEL, RECORDS, Job, Shape, make_inputs, run_everywhere
from benchmarks.train_tables import estimates, scaling_row, table
from stanford_alpaca.errors import UserError

SHAPE = Shape(layers=1, hidden=16, vocab=400)


@pytest.fixture
def inputs(root, tmp_path):
    """A folder with 8 records, one global batch, whose answers have several lengths."""
    assert (
        make_inputs(tmp_path, str(root / "data" / "instructions" / "train.json"), 15, 8, 256, SHAPE)
        == 8
    )
    return tmp_path


def test_trl_and_we_count_the_same_targets_and_not_those_of_the_first_step(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs / MODEL)
    records = json.loads((inputs / RECORDS).read_text())
    # plus the end-of-sequence token
    epoch = sum(len(tokenizer(record["output"])["input_ids"]) + 1 for record in records)
    for contender in ("trl", "emo-padding_free"):
        (figures,) = run_everywhere(Job(contender, str(inputs), 3, 8, 256, "cpu", 1))
        assert figures["targets"] == 2 * epoch
        assert figures["seconds"] > 0


def test_a_real_models_folder_is_used_as_it_is(root, tmp_path, inputs):
    (real := tmp_path / "real").mkdir()
    shape = Shape(0, 0, 0, str(inputs / MODEL))
    data = str(root / "data" / "instructions" / "train.json")
    assert make_inputs(real, data, 15, 8, 256, shape) == 8
    assert (real / RECORDS).read_text() == (inputs / RECORDS).read_text()
    found = []
    for name in ("emo-lora-sampled", "trl-lora"):
        (figures,) = run_everywhere(Job(name, str(real), 2, 8, 256, "cpu", 1))
        found.append(figures["targets"])
    assert found[0] == found[1] > 0


def test_two_processes_count_what_they_receive(inputs):
    job = Job("emo", str(inputs), 2, 4, 256, "cpu", 1, 2, "ddp", count=True)
    ranks = run_everywhere(job)
    row = scaling_row(job, ranks, SHAPE.config(256))
    # An epoch is one step, so the counted step has the same targets.
    assert row["targets"] == sum(rank["targets"] for rank in ranks)
    # Gradients in float32, over a ring; the other 40 bytes are the guard's.
    assert row["bytes_by_kind"]["all-reduce"] == row["estimated_bytes"] + 40
    assert row["bytes"] == pytest.approx(row["estimated_bytes"], rel=1e-2)


def test_the_table_sets_ours_against_the_like_of_it():
    def row(name, **rates):
        runs = {
            place: [
                {
                    "tokens_per_s": rate,
                    "seconds": 2.0,
                    "targets": 40,
                    "positions": 90,
                    "peak_mib": 7.4,
                    "steps": 4,
                }
            ]
            for place, rate in rates.items()
        }
        return {"contender": name, "runs": runs}

    rows = [
        row("trl", default=10.0, launcher=20.0),
        row("trl-packing", launcher=25.0),
        row("emo-packing", launcher=50.0),
    ]
    last = table(rows).splitlines()[-1]
    assert (
        last == "| emo-packing | - | 50 (50-50) | 500 | 10 | 22 | 7 | 5.00 | 2.50 | 2.00 | 2.00 |"
    )


def test_the_paper_estimate_reaches_1024():
    lines = {
        tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in estimates().splitlines()[2:]
    }
    received = {key: cells[:3] for key, cells in lines.items()}
    assert received["| fsdp", "replicate"] == ["46.94", "52.81", "53.59"]
    # With 1024 ranks, some would get none of the 32000 rows.
    assert received["| fsdp", "vocab_parallel"][2] == "-"


def test_mistakes_are_told_before_anything_is_measured(tmp_path):
    for flags in (
        {"data": "nowhere.json"},
        {"model": "nowhere"},
        {"only": "emo,best"},
        {"steps": 1},
        {"hidden": 100},
    ):
        with pytest.raises(UserError, match=next(iter(flags))):
            run(results=str(tmp_path), **flags)
    assert list(tmp_path.iterdir()) == []
