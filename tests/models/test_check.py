"""Folders of models of strangers: nothing is waited for, and nothing outside of them is read."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.templates import use_chat_template
from stanford_alpaca.errors import UserError
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource


@pytest.fixture
def folder(root, tmp_path):
    """A folder with the shipped base model, whose weights are links."""
    return shutil.copytree(root / "data" / "tiny-base", tmp_path / "base")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("weights.bin", "names weights.bin, and only safetensors"),
        ("../outside.safetensors", r"names \.\./outside\.safetensors"),
        ("/tmp/outside.safetensors", "names /tmp/outside"),
        ("below/model.safetensors", "names below/model"),
        (5, "names 5"),
        (None, "no index of weights"),
    ],
)
def test_an_index_names_safetensors_beside_it_alone(folder, named, said):
    content = {} if named is None else {"weight_map": {"a": "model.safetensors", "b": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        check_model(ModelSource(str(folder)))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    check_model(ModelSource(str(folder)))


def test_the_index_of_a_hub_name_is_looked_at_too(folder, tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "weights.bin"}}')
    asked = []

    def download(*args, **kwargs):
        asked.append(args[:2])
        return str(index)

    monkeypatch.setattr("stanford_alpaca.models.check.cached_file", download)
    with pytest.raises(UserError, match=r"names weights\.bin"):
        check_model(ModelSource("somebody/model"))
    assert asked == [("somebody/model", "model.safetensors.index.json")]


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "socket"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "a.bin"])
def test_what_is_no_file_in_a_models_folder_is_named(folder, kind, name):
    place = folder / name
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "link":
        place.symlink_to("nowhere")
    else:
        os.mknod(place, 0o140600)
    with pytest.raises(UserError, match=rf"{name}: a folder, a pipe, a device or a link"):
        check_model(ModelSource(str(folder)))
    with pytest.raises(UserError, match=rf"--chat_template .*{name}: a folder, a pipe"):
        use_chat_template(SimpleNamespace(chat_template=None), str(folder))


def test_a_pipe_in_the_place_of_costs_is_named(tmp_path):
    os.mkfifo(tmp_path / "cost.safetensors")
    with pytest.raises(ValueError, match="a folder, a pipe or a device; wanted a file"):
        CostEmbedding.from_file(tmp_path / "cost.safetensors")


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda file, mode: file.name != "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read \(Permission denied\)"):
        check_model(ModelSource(str(folder)))


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_settings_that_are_nested_too_deep_are_one_line(folder, name):
    (folder / name).write_text("[" * 100_000)
    if name == "adapter_config.json":
        (folder / "config.json").unlink()
    with pytest.raises(UserError) as refused:
        check_model(ModelSource(str(folder)), or_adapter=True)
    assert "\n" not in str(refused.value)


def adapter_of(folder, tmp_path):
    """Returns an adapter of a base, as far as it is looked at before its weights."""
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return ModelSource(str(tmp_path / "adapter"))


def test_the_base_of_an_adapter_is_looked_at_too(folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "weights.bin"}}')
    with pytest.raises(UserError, match=r"the base of .*names weights\.bin"):
        check_model(adapter_of(folder, tmp_path), or_adapter=True)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "a.pt", "a.model", "a.gguf", "a.py", "a.txt"]
)
def test_a_pipe_of_any_kind_that_loaders_read_is_named(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"{name}: a folder, a pipe, a device or a link"):
        check_model(ModelSource(str(folder)))


def test_a_pipe_in_the_place_of_an_adapter_is_not_waited_for(folder, tmp_path):
    source = adapter_of(folder, tmp_path)
    os.mkfifo(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: a folder, a pipe"):
        check_model(source, or_adapter=True)
