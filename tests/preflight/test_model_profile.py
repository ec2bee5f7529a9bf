"""Tests parameter counts and saved activations.

They come from the configuration alone, and are compared with a real model.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config

from stanford_alpaca.errors import UserError
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.preflight import model_profile
from stanford_alpaca.preflight.model_profile import (
    count_activations,
    count_parameters,
    decoder_layers,
    profile_model,
    twins_of,
)
from stanford_alpaca.run.arguments import OLDER_NAMES

OPT = pytest.mark.skipif(
    OLDER_NAMES, reason="OPT of transformers 5.17 reads a number of a tensor: preflight refuses it"
)
SERVED = ("llama", "qwen3", "gpt2", "gemma2", "opt", "mixtral")


def test_llama_7b_by_part(root):
    with torch.device("meta"):
        counts = count_parameters(
            AutoModelForCausalLM.from_config(
                ModelSource(str(root / "examples" / "llama-7b")).config()
            )
        )
    assert counts.total == 6_738_415_616
    assert (counts.embedding, counts.head, counts.norm) == (131_072_000, 131_072_000, 4096)
    assert (counts.layer, counts.layers, counts.tied) == (202_383_360, 32 * 202_383_360, False)


def test_flops_of_the_layers(make_model):
    profile = profile_model(make_model("llama").config, 16, "float32")
    assert profile.flops[0] == 6 * (profile.parameters.total - profile.parameters.embedding)
    assert profile.layer_flops == 6 * profile.parameters.layers


@pytest.mark.parametrize("name", SERVED)
def test_every_parameter_is_in_one_part(make_model, name):
    model = make_model(name)
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.layers == 2 * counts.layer > 0
    assert counts.tied == (name in ("gpt2", "gemma2", "opt"))


def saved_by(model, rows: int, length: int, precision: str) -> int:
    """Returns the bytes that a real forward pass over a padded batch saves.

    Storages of parameters are left out.
    """
    own, held = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -2:] = 0
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.base_model(
            input_ids=torch.randint(97, (rows, length)), attention_mask=mask, use_cache=False
        )
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("llama", "float32"),
        ("llama", "autocast"),
        ("llama", "bfloat16"),
        ("gpt2", "autocast"),
        ("gemma2", "bfloat16"),
        pytest.param("opt", "float32", marks=OPT),
    ],
)
def test_activations_are_those_of_a_real_run(make_model, name, precision):
    model = (
        make_model(name).to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    )
    counted = count_activations(model.config, 24, precision)
    got = counted.outside.of(3) + counted.layers.of(3)
    assert got == pytest.approx(saved_by(model, 3, 24, precision), rel=0.01)
    width = model.config.hidden_size
    assert counted.inputs.of(3) == 2 * 3 * 24 * width * (2 if precision == "bfloat16" else 4)
    assert counted.layer.of(3) == pytest.approx(counted.layers.of(3) / 2, rel=0.01)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@pytest.mark.parametrize(  # gemma2's layers alternate
    "name", ["llama", "gemma2", pytest.param("opt", marks=OPT)]
)
def test_equal_layers_that_do_not_run_are_counted(make_model, name, precision, monkeypatch):
    config = make_model(name, num_hidden_layers=7, layer_types=None).config
    counted = count_activations(config, 24, precision)
    assert len(twins_of(decoder_layers(make_model(name, num_hidden_layers=7)), config)) in (3, 5)
    monkeypatch.setattr(model_profile, "twins_of", lambda *_: {})
    assert count_activations(config, 24, precision) == counted


def test_what_cannot_be_estimated_is_an_error(make_model):
    model = make_model("llama")
    model._no_split_modules = []  # then the layers are found as FSDP finds them
    assert decoder_layers(model) == list(model.model.layers)
    with pytest.raises(UserError, match="cannot be estimated from its configuration"):
        profile_model(T5Config(), 16, "float32")
