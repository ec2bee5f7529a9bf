"""Tests where the costs live.

It changes nothing but memory and traffic. Impossible settings are refused.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.errors import UserError
from stanford_alpaca.objective.attach import attach_objective
from stanford_alpaca.run.flag_checks import check_cost_sharding
from stanford_alpaca.run.parse import parse
from stanford_alpaca.train import train
from stanford_alpaca.training import cost_sharding
from stanford_alpaca.training.cost_sharding import shard_cost
from tests.helpers import evaluations, steps
from tests.ranks import run_ranks


def training(**changes):
    return SimpleNamespace(
        **{
            "world_size": 4,
            "fsdp": True,
            "device": "cpu",
            "fsdp_plugin_args": {"cpu_ram_efficient_loading": False},
        }
        | changes
    )


@pytest.mark.parametrize(
    ("asked", "cost", "changes", "family", "message"),
    [
        ("shard", "adaptive", {}, "llama", "no frozen cost rows"),
        ("vocab_parallel", "frozen", {}, "gpt2", "this model's is tied"),
        ("vocab_parallel", "frozen", {}, "mixtral-routed", "the router's loss of this model"),
        ("vocab_parallel", "frozen", {"world_size": 60}, "llama", "60 processes are too many"),
    ],
)
def test_what_cannot_be_had_is_refused(make_model, asked, cost, changes, family, message):
    model = make_model(family)
    attach_objective(model, "emo", cost)
    with pytest.raises(UserError, match=message):
        shard_cost(model, asked, training(**changes))


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"cost_sharding": "shard"}, 1, "shard needs at least 2 processes"),
        ({"cost_sharding": "shard", "cost_cache_mib": 5}, 2, "keeps no rows"),
        ({"cost_sharding": "shard", "cost": "adaptive"}, 2, "has no rows to shard"),
        ({"cost_sharding": "vocab_parallel"}, 2, "needs --engine fsdp"),
        (
            {"cost_sharding": "vocab_parallel", "engine": "fsdp", "teacher": "x"},
            2,
            "--teacher exclude each other",
        ),
    ],
)
def test_flags_that_exclude_each_other_are_refused_before_anything_is_loaded(
    arguments, monkeypatch, changes, ranks, message
):
    run = parse(arguments(**changes))
    monkeypatch.setattr(type(run.training), "world_size", ranks)
    with pytest.raises(UserError, match=message):
        check_cost_sharding(run)


def test_auto_keeps_an_embedding_whole_whose_rows_are_to_be_kept(arguments):
    assert parse(arguments(cost_cache_mib=5)).objective.where_costs_live == "replicate"
    assert parse(arguments()).objective.where_costs_live == "auto"
    assert parse(arguments(cost_sharding="shard")).objective.where_costs_live == "shard"


def test_auto_shards_large_embeddings_where_the_engine_shards(make_model, monkeypatch):
    chosen = []
    monkeypatch.setattr(cost_sharding, "ShardedCost", lambda cost, **_: chosen.append(cost) or cost)
    for limit, changes, want in [
        (1, {}, "shard"),
        (2**30, {}, "replicate"),
        (1, {"fsdp": False}, "replicate"),
        (
            1,
            {"fsdp": False, "hf_deepspeed_config": SimpleNamespace(is_zero3=lambda: True)},
            "shard",
        ),
        (1, {"world_size": 1}, "replicate"),
    ]:
        monkeypatch.setattr(cost_sharding, "AUTO_SHARD_BYTES", limit)
        model = make_model("llama")
        attach_objective(model, "emo")
        assert shard_cost(model, "auto", training(**changes)) == want
    assert len(chosen) == 2


def observed(argv: list[str]) -> dict:
    """Trains on this rank.

    Returns the cost's rows in the last step, the shape of this rank's output layer, and whether the
    output layer was ever gathered.
    """
    from stanford_alpaca.training import trainer

    seen, log = {}, trainer.EmoTrainer.log

    def look(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model)
        group = model.get_output_embeddings()._get_fsdp_state()._fsdp_param_group
        seen["gathered"] = any(
            hasattr(parameter, "_unsharded_param") for parameter in group.fsdp_params
        )
        seen["rows"] = getattr(self.emo.cost, "rows", None)
        seen["weight"] = model.get_output_embeddings().weight.to_local().shape
        return log(self, *args, **kwargs)

    trainer.EmoTrainer.log = look
    train(argv)
    return seen


def test_a_resumed_vocab_parallel_run_has_the_costs_of_the_base(arguments, tmp_path, root):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "eval_path": tmp_path / "held.json",
    }
    train(arguments(output_dir=tmp_path / "one", **settings))
    flags = ("--fsdp", "--cost_sharding", "vocab_parallel")
    saves = {"save_strategy": "steps", "save_steps": 2}
    for seen in run_ranks(
        2, observed, arguments(*flags, output_dir=tmp_path / "two", **settings, **saves)
    ):
        assert not seen["gathered"]
    resume = {
        "resume_from_checkpoint": tmp_path / "two" / "checkpoint-2",
        "output_dir": tmp_path / "again",
    }
    base = CostEmbedding(
        load_file(root / "data" / "tiny-base" / "model.safetensors")["lm_head.weight"]
    )
    for rank, seen in enumerate(run_ranks(2, observed, arguments(*flags, **settings | resume))):
        assert torch.equal(seen["rows"], base.rows[1024 * rank : 1024 * (rank + 1)])
        assert seen["weight"] == (1024, 160) and not seen["gathered"]
    for folder in ("two", "again"):
        for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / folder), strict=True):
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        got, want = (
            evaluations(tmp_path / folder)[-1]["eval_emo"],
            evaluations(tmp_path / "one")[-1]["eval_emo"],
        )
        assert got == pytest.approx(want, rel=1e-5)
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == load_file(root / "data" / "tiny-base" / "model.safetensors").keys()
    for name, tensor in load_file(tmp_path / "one" / "model.safetensors").items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_sharded_output_layer_in_bf16_takes_several_micro_batches(arguments, tmp_path):
    """FSDP sums gradients in float32, except for this layer, which has none to sum."""
    settings = {"bf16": True, "per_device_train_batch_size": 4, "engine": "fsdp"}
    for how in ("replicate", "vocab_parallel"):
        run_ranks(2, train, arguments(output_dir=tmp_path / how, cost_sharding=how, **settings))
    for one, two in zip(
        steps(tmp_path / "replicate"), steps(tmp_path / "vocab_parallel"), strict=True
    ):
        assert one["loss"] == pytest.approx(two["loss"], abs=0.02)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.05)


def test_other_objectives_with_a_sharded_output_layer(arguments, tmp_path):
    """The adaptive cost reads the live shards; identity and mle need no rows.

    Samples during training gather the output layer temporarily.
    """
    (tmp_path / "prompts.txt").write_text("What is another word for big?\n")
    for name, changes in {
        "adaptive": {
            "cost": "adaptive",
            "sample_prompts": tmp_path / "prompts.txt",
            "sample_steps": 1,
            "sample_max_new_tokens": 2,
        },
        "identity": {"mode": "emo2", "cost_kind": "identity"},
        "shuffled": {"cost": "adaptive", "cost_kind": "shuffled", "cost_seed": 2},
        "centred": {"cost_kind": "centred"},
        "mle": {"mode": "mle", "eval_path": None},
    }.items():
        settings = {"per_device_train_batch_size": 2, "eval_path": tmp_path / "held.json"} | changes
        train(
            arguments(
                output_dir=tmp_path / f"{name}-1",
                **{k: v for k, v in settings.items() if not k.startswith("sample")},
            )
        )
        run_ranks(
            2,
            train,
            arguments(
                "--fsdp",
                "--cost_sharding",
                "vocab_parallel",
                output_dir=tmp_path / f"{name}-2",
                **settings,
            ),
        )
        for one, two in zip(
            steps(tmp_path / f"{name}-1"), steps(tmp_path / f"{name}-2"), strict=True
        ):
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert len(Path(tmp_path / "adaptive-2" / "samples.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "mle-2" / "train_results.json").read_text())["train_loss"] > 0
