"""Tests loading by rank 0 alone, where the engine shards the weights.

Only rank 0 reads weights and costs. What it finds, and its errors, reach all ranks.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stanford_alpaca.distributed.weights import (
    loading_whole,
    materialize_on_cpu,
    stored_buffers,
    weights_come_from_rank_0,
)
from stanford_alpaca.errors import UserError
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.run import build as training
from stanford_alpaca.run.parse import parse
from stanford_alpaca.run.resolve import resolve
from stanford_alpaca.training.cost_sharding import shard_cost
from tests.ranks import run_ranks


def made(argv: list[str]):
    """Returns what this rank has before the engine takes over, and whether it read the weights."""
    read, load = [], ModelSource.load
    ModelSource.load = lambda *args, **kwargs: read.append(args) or load(*args, **kwargs)
    run = parse(argv)
    resolve(run)
    tokenizer = ModelSource(run.model.model_name_or_path).tokenizer(512)
    model = training.make_model(run, tokenizer, with_cost=True)
    emo = model.emo_objective
    before = emo.cost.rows.device.type
    shard_cost(model, "replicate", run.training)
    devices = {parameter.device.type for parameter in model.parameters()}
    return (
        bool(read),
        before,
        emo.cost.rows,
        devices,
        emo.form,
        model.config.to_dict(),
        model.generation_config.to_dict(),
    )


def test_one_rank_reads_and_the_others_get_what_it_found(arguments):
    (read, before, rows, _, *found), (read_too, before_too, rows_too, devices, *found_too) = (
        run_ranks(2, made, arguments("--fsdp"))
    )
    assert read and not read_too and before == "cpu" and before_too == "meta"
    assert torch.equal(rows, rows_too) and devices == {"cpu"} and found == found_too
    # DDP holds the whole model on all ranks anyway.
    assert [result[0] for result in run_ranks(2, made, arguments())] == [True, True]


def learned(argv: list[str]):
    """Returns the stored buffers of the model that this rank trains.

    Also returns whether one rank reads the weights for all.
    """
    run = parse(argv)
    resolve(run)
    with loading_whole(run.training):
        model = training.make_model(
            run, ModelSource(run.model.model_name_or_path).tokenizer(512), with_cost=True
        )
    return stored_buffers(model), weights_come_from_rank_0(run.training)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_what_a_checkpoint_holds_beside_parameters_reaches_all_ranks(
    arguments, tmp_path, root, engine
):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
    }
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
    }
    heads |= {
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
    }
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=2048, first_k_dense_replace=1, topk_group=1, **shape, **heads
    )
    model = AutoModelForCausalLM.from_config(config)
    ((name, buffer),) = stored_buffers(model).items()
    buffer.copy_(torch.linspace(-1, 1, 4))
    model.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((root / "data" / "tiny-base" / file).read_bytes())
    for buffers, by_one in run_ranks(
        2, learned, arguments(engine=engine, model_name_or_path=tmp_path / "model")
    ):
        assert torch.equal(buffers[name], torch.linspace(-1, 1, 4)) and by_one == (
            engine == "zero3"
        )


def refused(argv: list[str]) -> str:
    run = parse(argv)
    resolve(run)
    with pytest.raises(UserError) as error:
        training.make_model(
            run, ModelSource(run.model.model_name_or_path).tokenizer(512), with_cost=True
        )
    return str(error.value)


def test_what_fails_on_rank_0_is_an_error_on_all(arguments, tmp_path, root):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((root / "data" / "tiny-base" / name).read_bytes())
    one, two = run_ranks(2, refused, arguments("--fsdp", model_name_or_path=folder))
    assert one == two and "transformers cannot load this folder (" in one


def test_an_empty_model_has_the_buffers_and_the_ties_of_a_loaded_one(make_model, family, tmp_path):
    loaded = make_model(family)
    loaded.save_pretrained(tmp_path)
    empty = ModelSource(str(tmp_path)).empty()
    assert all(parameter.is_meta for parameter in empty.parameters())
    materialize_on_cpu(empty)
    for (name, one), (same, two) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == same and torch.equal(one, two)
    assert [name for name, _ in empty.named_parameters()] == [
        name for name, _ in loaded.named_parameters()
    ]
    for (_, one), (_, two) in zip(empty.named_parameters(), loaded.named_parameters(), strict=True):
        assert (one.shape, one.dtype, one.device.type) == (two.shape, two.dtype, "cpu")
