"""Tests loading for fine-tuning.

Weights are float32, missing special tokens are added, and new vocabulary rows are the mean of the
old ones.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stanford_alpaca.errors import UserError
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource, fit_vocabulary
from stanford_alpaca.models.savable import make_savable


@pytest.fixture
def folder(tmp_path, root, make_model):
    """A bfloat16 GPT-2 (tied head) whose tokenizer lacks pad and end-of-sequence tokens."""
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    make_model("gpt2", vocab_size=2048).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def test_float32_weights_and_new_rows_that_are_the_mean(folder):
    tokenizer, model = ModelSource(str(folder)).tokenizer(64), ModelSource(str(folder)).load()
    assert model.dtype == torch.float32
    assert (tokenizer.pad_token, tokenizer.model_max_length, tokenizer.padding_side) == (
        "[PAD]",
        64,
        "right",
    )
    assert tokenizer.eos_token == "</s>"
    old = model.get_input_embeddings().weight.detach().clone()
    added = fit_vocabulary(model, tokenizer)
    assert added == len(tokenizer) - 2048 > 0
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(layer.weight[:2048], old)
        torch.testing.assert_close(layer.weight[2048:], old.mean(0, keepdim=True).expand(added, -1))
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_a_padded_vocabulary_is_not_cut(root, make_model):
    tokenizer, model = (
        ModelSource(str(root / "data" / "tiny-base")).tokenizer(),
        make_model("llama", vocab_size=2100),
    )
    assert fit_vocabulary(model, tokenizer) == 0
    assert model.get_output_embeddings().weight.shape[0] == 2100


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        (
            {"early_stopping": True, "length_penalty": 0.5},
            {"early_stopping": True, "length_penalty": 0.5},
        ),
        ({"output_attentions": True}, {"output_attentions": True}),
        (
            {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_p": 0.9},
        ),
        ({"temperature": 0.6, "max_new_tokens": 7}, {"temperature": 0.6}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 5}, {}),
        ({"num_beams": 3, "early_stopping": True, "length_penalty": 0.5}, {}),
    ],
)
def test_published_settings_are_saved_again_without_what_cannot_be(
    root, tmp_path, capsys, settings, dropped, make_model
):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 1}))
    model = make_model("llama", vocab_size=2048)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    make_savable(model, ModelSource(str(root / "data" / "tiny-base")).tokenizer(), "a/base")
    said = capsys.readouterr().out
    assert all(f"{name} {value}" in said for name, value in dropped.items()) and bool(said) == bool(
        dropped
    )
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in settings} == settings | dict.fromkeys(dropped)


def test_what_cannot_be_saved_is_found_before_training(root, make_model):
    model = make_model("llama", vocab_size=2048)
    model.config.of_somebody = object()
    with pytest.raises(
        UserError, match=r"a/base: its LlamaConfig cannot be saved again .*; mend it there first"
    ):
        make_savable(model, ModelSource(str(root / "data" / "tiny-base")).tokenizer(), "a/base")


def test_what_is_no_model(tmp_path):
    for path in (str(tmp_path), str(tmp_path / "none"), "nobody/nothing-here"):
        for load in (
            check_model,
            ModelSource.config,
            ModelSource.tokenizer,
            ModelSource.load,
            ModelSource.empty,
        ):
            with pytest.raises(UserError, match="cannot load a model"):
                load(ModelSource(path))


def test_the_shipped_base_model(root):
    folder = root / "data" / "tiny-base"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 8 * 2**20
