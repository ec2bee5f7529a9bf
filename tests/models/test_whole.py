"""Tests incomplete models.

Weights that do not fill their architecture, and folders that changed after they were saved, give a
one-line error in every command.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.cost.__main__ import build
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation import metrics, report
from stanford_alpaca.evaluation.measures.mauve import load_featuriser
from stanford_alpaca.generate import run as generate
from stanford_alpaca.models import identity
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.identity import BASE, identify_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.train import train
from tests.helpers import refusal

WEIGHTS = "model.safetensors"


@pytest.fixture
def untied(root, make_model, tmp_path) -> Path:
    """A model whose output layer is not its embedding, with the shipped tokenizer."""
    folder = tmp_path / "untied"
    model = make_model("llama", vocab_size=2048, positions=512)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop(tensors):
    del tensors["lm_head.weight"]


def add(tensors):
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


def reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(3)


def finish(folder: Path, **about) -> None:
    """Writes a manifest, as a finished run does."""
    files = manifest.entries_of(folder, manifest.list_saved(folder))
    manifest.write(folder, files, {"step": 1, **about})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(content)


def commands(folder: Path, data: Path, out: Path):
    return {
        "generate": lambda: generate(
            str(folder), instruction="Add.", max_new_tokens=2, out=str(out / "a.jsonl")
        ),
        "metrics": lambda: metrics.run(str(folder), data=str(data), limit=2, out=str(out / "b")),
        "report": lambda: report.run(str(folder), data=str(data), limit=2, out=str(out / "c.html")),
        "cost build": lambda: build(head=str(folder), out=str(out / "d.safetensors")),
    }


COMMANDS = list(commands(Path(), Path(), Path()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, r"\(missing: lm_head.weight\)"),
        (add, r"\(of no use: model.layers.7.mlp.up_proj.weight\)"),
        (reshape, r"\(of another shape: model.norm.weight \(\[3\], wanted \[\d+\]\)\)"),
    ],
)
def test_weights_that_do_not_fill_the_architecture_are_refused(untied, change, said, caplog):
    rewrite(untied, change)
    with pytest.raises(
        UserError,
        match=f"untied: its weights do not fill its architecture {said}; give a complete model",
    ):
        ModelSource(str(untied)).load()
    assert not caplog.records  # transformers does not print its own table
    ModelSource(str(untied), from_config=True).load()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_goes_on_from_random_weights(untied, root, tmp_path, command):
    rewrite(untied, drop)
    with pytest.raises(
        UserError, match=r"do not fill its architecture \(missing: lm_head.weight\)"
    ):
        commands(untied, root / "data" / "instructions" / "held_out.json", tmp_path)[command]()


@pytest.mark.parametrize("flags", [(), ("--lora", "True"), ("--teacher", "BROKEN")])
def test_training_does_not_either(untied, arguments, root, flags):
    rewrite(untied, drop)
    flags = [str(untied) if flag == "BROKEN" else flag for flag in flags]
    base = root / "data" / "tiny-base" if "--teacher" in flags else untied
    mode = {"mode": "mle", "mix_ratio": None} if "--teacher" not in flags else {}
    with pytest.raises(
        UserError, match=r"do not fill its architecture \(missing: lm_head.weight\)"
    ):
        train(arguments(*flags, model_name_or_path=base, **mode))


def test_tied_and_older_weights_fill_it(make_model, tmp_path):
    model = make_model("gpt2", vocab_size=2048)  # tied: the file holds only one of the two weights
    model.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
        ),
    )
    assert torch.equal(ModelSource(str(tmp_path)).load().lm_head.weight, model.lm_head.weight)


def test_features_are_not_of_random_weights(untied):
    rewrite(untied, drop)
    load_featuriser(ModelSource(str(untied)))  # needs no output layer
    rewrite(untied, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"do not fill its architecture \(missing: norm.weight\)"):
        load_featuriser(ModelSource(str(untied)))


# ---- what was saved, and what an adapter was trained on ------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
def test_a_finished_folder_that_has_changed_is_refused(
    untied, root, tmp_path, capsys, monkeypatch, command, file
):
    finish(untied)
    flip(untied / file)
    call = commands(untied, root / "data" / "instructions" / "held_out.json", tmp_path)[command]
    status, line = refusal(capsys, monkeypatch, call, tmp_path)
    assert (
        status == 2
        and f"{untied}: not what was saved ({file}: its content has changed); give another copy"
        in line
    )


def test_a_large_folder_is_read_again_where_that_is_asked_for(untied, capsys, monkeypatch):
    finish(untied)
    flip(untied / WEIGHTS)
    monkeypatch.setattr(identity, "READ_WHOLE", 1000)
    check_model(ModelSource(str(untied)))
    assert (
        "sizes alone are compared with manifest.json; --verify reads them"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="its content has changed"):
        check_model(ModelSource(str(untied)), verify=True)
    (untied / WEIGHTS).write_bytes(b"short")
    with pytest.raises(UserError, match=r"model\.safetensors: 5 bytes, not"):
        check_model(ModelSource(str(untied)))


def test_what_a_user_adds_to_a_finished_folder_changes_nothing(untied):
    (untied / "README.md").write_text("a card")
    finish(untied)
    before = identify_model(str(untied))
    (untied / "README.md").write_text("another")
    (untied / "samples.json").write_text("[]")
    check_model(ModelSource(str(untied)))
    assert identify_model(str(untied)) == before


@pytest.mark.parametrize(
    "name", ["cost.safetensors", "chat_template.jinja", "generation_config.json", "notes.py"]
)
def test_what_does_not_change_the_weights_leaves_a_base_the_base(untied, name):
    before = identify_model(str(untied), weights=True)
    (untied / name).write_bytes(b"{}")
    assert identify_model(str(untied), weights=True) == before
    flip(untied / WEIGHTS)
    assert identify_model(str(untied), weights=True) != before


def test_a_whole_model_with_an_adapter_beside_it_is_refused(untied):
    model = ModelSource(str(untied)).load()
    get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(untied)
    for load in (ModelSource.load, check_model):
        with pytest.raises(
            UserError,
            match="untied: holds a whole model and an adapter beside it; take one of them away",
        ):
            load(ModelSource(str(untied)))


def test_masks_that_older_versions_saved_are_no_weights(make_model, tmp_path):
    make_model("gpt2", vocab_size=64).save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
    )
    ModelSource(str(tmp_path)).load()


def test_an_adapter_whose_base_was_replaced_is_refused(
    untied, make_model, tmp_path, root, capsys, monkeypatch
):
    model = ModelSource(str(untied)).load()
    adapter = tmp_path / "adapter"
    get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(untied)})
    )
    AutoTokenizer.from_pretrained(untied).save_pretrained(adapter)
    finish(adapter, run={"made_with": {BASE: identify_model(str(untied), weights=True)}})
    data = root / "data" / "instructions" / "held_out.json"
    commands(adapter, data, tmp_path)["generate"]()
    (tmp_path / "a.jsonl").unlink()
    shutil.rmtree(untied)
    torch.manual_seed(1)
    other = make_model("llama", vocab_size=2048, positions=512)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(untied)
    for command in ("generate", "metrics", "report"):
        status, line = refusal(
            capsys, monkeypatch, commands(adapter, data, tmp_path)[command], tmp_path
        )
        assert (
            status == 2
            and f"{untied}: not the base that {adapter} was trained on, or it has changed since"
            in line
        )
