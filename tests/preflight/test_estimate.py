"""Checks memory and communication by hand, for a model of 6010 parameters on four ranks."""

import pytest

from stanford_alpaca.preflight.estimate import (
    Setup,
    compute_flops,
    host_memory,
    loss_bytes,
    moments,
    peak_memory,
    precision_of,
    shardings_of,
    traffic,
)
from stanford_alpaca.preflight.model_profile import Activations, Line, ModelProfile, Parameters

COUNTS = Parameters(
    embedding=1000, layers=4000, layer=2000, norm=10, head=1000, vocab_size=100, width=10
)
TIED = Parameters(
    embedding=1000, layers=4000, layer=2000, norm=10, head=0, vocab_size=100, width=10
)
SAVED = Activations(Line(7, 100), Line(0, 1000), Line(0, 500), Line(0, 50), Line(0, 20))
PROFILE = ModelProfile(COUNTS, (100.0, 2.0), 60.0, SAVED)
SETUP = Setup(ranks=4, batch=2, accumulation=3, length=8, priced=True, cost_cache_mib=0)
ONCE = Setup(ranks=4, batch=6, accumulation=1, length=8, priced=True, cost_cache_mib=0)


@pytest.mark.parametrize(
    ("engine", "weights", "held", "final", "optimizer"),
    [
        ("ddp", 4 * 6010, 4 * 6010, 4 * 6010, 8 * 6010),
        ("fsdp", 6010, 4 * 6010, 4 * 6010, 2 * 6010),
        ("zero1", 2 * 6010, 2 * 6010, 2 * 6010, 3 * 6010),
        ("zero2", 2 * 6010, 6010 / 2, 6010 / 2, 3 * 6010),
        ("zero3", 6010 / 2, 6010 / 2, 6010 / 2, 3 * 6010),
        ("zero3_offload", 0, 0, 0, 0),
    ],
)
def test_state_of_four_ranks(engine, weights, held, final, optimizer):
    at = moments(PROFILE, SETUP, engine, "replicate")
    assert {m.weights for m in at.values()} == {weights}
    assert (at["loss"].gradients, at["end"].gradients, at["loss"].optimizer) == (
        held,
        final,
        optimizer,
    )
    once = moments(PROFILE, ONCE, engine, "replicate")
    assert once["loss"].gradients == (held if engine in ("zero2", "zero3") else 0)
    assert once["end"].gradients == (6010 if engine == "fsdp" else final)
    copies = 0 if engine in ("ddp", "fsdp", "zero3_offload") else 6010
    assert at["step"].optimizer - optimizer == copies


def test_vocab_parallel_keeps_the_heads_gradient_sharded_between_micro_batches():
    at = moments(PROFILE, SETUP, "fsdp", "vocab_parallel")
    assert at["loss"].gradients == 4 * 5010 + 1000
    assert at["loss"].gather == 2 * 10
    assert at["backward"].gradients == 4 * 5010 + 1000 + 4 * 250


def test_activations_by_moment():
    at = moments(PROFILE, SETUP, "zero2", "replicate")
    assert at["loss"].activations == 7 + 200 + 2000
    assert at["backward"].activations == 7 + 200 + 2000 + 3 * 40
    again = moments(PROFILE, Setup(**vars(SETUP) | {"checkpointing": True}), "zero2", "replicate")
    assert again["loss"].activations == 7 + 200 + 100
    assert again["backward"].activations == 7 + 200 + 100 + 1000 + 3 * 40
    assert peak_memory(PROFILE, SETUP, "zero2", "replicate").total == max(
        m.total for m in at.values()
    )


def test_what_is_gathered():
    fsdp = moments(PROFILE, SETUP, "fsdp", "shard")
    assert fsdp["loss"].gather == 2 * 1010 + 4 * 1000  # the tail in bfloat16, the cost in float32
    assert fsdp["backward"].gather == 2 * 1010 + 8 * 2000 + 2 * 2000
    assert moments(PROFILE, SETUP, "ddp", "replicate")["loss"].gather == 4 * 6010
    assert moments(PROFILE, SETUP, "zero3", "replicate")["loss"].gather == 2 * 6010 + 2 * 2 * 100


@pytest.mark.parametrize(
    ("sharding", "cost"), [("replicate", 4000 + 20_000), ("shard", 1000), ("vocab_parallel", 1000)]
)
def test_cost(sharding, cost):
    setup = Setup(**vars(SETUP) | {"cost_cache_mib": 1})
    assert moments(PROFILE, setup, "fsdp", sharding)["loss"].cost == cost


def test_the_loss_holds_a_chunk_the_gradient_and_copies():
    rows = 16 * 100  # all tokens fit in one chunk
    logits, costs, slices = rows * (4 + 2), 4 * rows * 0.31, 2 * 4 * rows
    hidden = 3 * 16 * 10 * 2
    assert (
        loss_bytes(COUNTS, SETUP, "zero2", "replicate")
        == logits + costs + slices + 4000 + 2000 + hidden
    )
    assert (
        loss_bytes(COUNTS, SETUP, "ddp", "replicate")
        == logits + costs + slices + 4000 + 2000 + 2000 + hidden
    )
    free = Setup(**vars(SETUP) | {"priced": False})
    assert loss_bytes(COUNTS, free, "zero2", "-") == logits + slices / 2 + 4000 + 2000 + hidden
    exact = Setup(**vars(SETUP) | {"bf16": False, "device": "cpu", "priced": False})
    assert loss_bytes(COUNTS, exact, "fsdp", "-") == 4 * rows + slices / 2 + 4000 + 2 * hidden


@pytest.mark.parametrize(
    ("engine", "sharding", "moved"),
    [
        ("ddp", "replicate", 8 * 6010),
        ("ddp", "shard", 8 * 6010 + 3 * 4000),
        ("fsdp", "replicate", 3 * 2 * (6010 + 5000) + 4 * 6010),
        (
            "fsdp",
            "vocab_parallel",
            3 * 2 * (5010 + 5000)
            + 4 * 5010
            + 3 * (64 * 10 * 6 + 64 * 8 + 8 * (19.84 * 10 + 5 * 64)),
        ),
        ("zero1", "replicate", 4 * 6010 + 2 * 6010),
        ("zero2", "replicate", 3 * 4 * 6010 + 2 * 6010),
        ("zero3", "shard", 3 * 2 * 2 * 6010 + 3 * 4000),
    ],
)
def test_bytes_of_a_step_on_four_ranks(engine, sharding, moved):
    assert traffic(COUNTS, SETUP, engine, sharding) == pytest.approx(0.75 * moved, rel=1e-12)


def test_a_tied_head_is_gathered_once_with_the_norm():
    assert traffic(TIED, SETUP, "fsdp", "replicate") == 0.75 * (3 * 2 * (5010 + 4000) + 4 * 5010)
    assert shardings_of("fsdp", SETUP, TIED) == ["replicate", "shard"]
    assert shardings_of("fsdp", SETUP, COUNTS) == ["replicate", "shard", "vocab_parallel"]


def test_shardings_need_ranks_costs_and_rows():
    assert shardings_of("zero2", SETUP, COUNTS) == ["replicate", "shard"]
    many = Setup(**vars(SETUP) | {"ranks": 64})  # 50 ranks get two rows each, and 14 get none
    assert shardings_of("fsdp", many, COUNTS) == ["replicate", "shard"]
    free = Setup(**vars(SETUP) | {"priced": False})
    assert shardings_of("fsdp", free, COUNTS) == ["-", "vocab_parallel"] and shardings_of(
        "ddp", free, COUNTS
    ) == ["-"]
    moved = 3 * 2 * (5010 + 5000) + 4 * 5010 + 3 * (64 * 10 * 6 + 64 * 8 + 8 * 3 * 64)
    assert traffic(COUNTS, free, "fsdp", "vocab_parallel") == pytest.approx(0.75 * moved, rel=1e-12)
    assert moments(PROFILE, free, "fsdp", "vocab_parallel")["loss"].cost == 0


def test_one_rank_moves_nothing():
    alone = Setup(**vars(SETUP) | {"ranks": 1})
    assert traffic(COUNTS, alone, "none", "replicate") == 0
    assert shardings_of("none", alone, COUNTS) == ["replicate"]
    assert (
        host_memory(6010, alone, "zero3_offload") == 18 * 6010
        and host_memory(6010, alone, "zero3") == 0
    )


def test_flops_and_precision():
    assert compute_flops(PROFILE, SETUP, 8) == 6 * (100 * 8 + 2 * 64)
    again = Setup(**vars(SETUP) | {"checkpointing": True})
    assert compute_flops(PROFILE, again, 8) == pytest.approx(6 * (120 * 8 + 2 * 64 * 4 / 3))
    names = [precision_of(engine, True) for engine in ("none", "ddp", "fsdp", "zero3")]
    assert (
        names == ["autocast", "autocast", "bfloat16", "bfloat16"]
        and precision_of("fsdp", False) == "float32"
    )
