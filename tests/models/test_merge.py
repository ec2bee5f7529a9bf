"""Tests merging an adapter.

The merged model has the logits of the base with its adapter, also when it is read again from disk.
What cannot be merged is refused with a reason.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from stanford_alpaca import merge_lora
from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.errors import ResumeError, UserError
from stanford_alpaca.models.identity import BASE, identify_model
from stanford_alpaca.models.load import fit_vocabulary
from tests.helpers import refusal

IDS = torch.arange(3, 2043, 12)[None, :96]


@pytest.fixture
def make_base(make_model, root, tmp_path):
    """Saves a random model with the tiny base's vocabulary and tokenizer in a folder."""

    def make(family: str = "llama", name: str = "base", **changes) -> Path:
        make_model(family, 2048, **changes).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def load(folder: Path):
    """Loads the merged model as its users do. No key may be missing or unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_close(logits: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4 * want.abs().max().item())


def with_added(added: int) -> torch.Tensor:
    return torch.cat([IDS, 2048 + torch.arange(added)[None]], dim=1)


def make_adapter(base: Path, folder: Path, added: int = 0, **config) -> torch.Tensor:
    """Saves a random adapter.

    Returns the logits of the base with this adapter, on IDS and the ``added`` tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if added:
        tokenizer.add_tokens([f"<added {n}>" for n in range(added)])
        tokenizer.save_pretrained(folder)
        fit_vocabulary(model, tokenizer)
    if "modules_to_save" not in config and "trainable_token_indices" not in config:
        config = {"target_modules": "all-linear"} | config
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    ).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        logits = model(with_added(added)).logits
    model.save_pretrained(folder)
    return logits


CASES = {  # family, adapter config, whether embedding and output layer are tied afterwards
    "linear layers": ("llama", {}, False),
    "dora": (
        "llama",
        {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head", "embed_tokens"]},
        False,
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}, True),
    "conv1d, embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}, False),
    "tied": ("gemma3", {}, True),
    "tied, lm_head": ("gemma3", {"target_modules": ["q_proj", "lm_head"]}, False),
    "tied, embedding saved": ("gemma3", {"modules_to_save": ["embed_tokens"]}, False),
    "tied, head saved": ("gemma3", {"modules_to_save": ["lm_head"]}, False),
    "tied, both saved as one": (
        "gemma3",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "tied, both lora as one": (
        "gemma3",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "tied, tokens": ("gemma3", {"trainable_token_indices": [3, 5, 2047]}, True),
}


@pytest.mark.parametrize(("family", "config", "tied"), CASES.values(), ids=CASES)
def test_merged_is_unmerged(make_base, tmp_path, capsys, family, config, tied):
    base, adapter, out = make_base(family), tmp_path / "adapter", tmp_path / "out"
    want = make_adapter(base, adapter, **config)
    merge_lora.run(str(adapter), str(out))
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        (
            rf"merged r 4, alpha 8 into \d+ layers.* of {base}; logits .* saved the float32 model "
            rf"to {out}"
        ),
        line,
    )
    model = load(out)
    assert_close(model(IDS).logits, want)
    assert model.config.tie_word_embeddings == tied
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    plain = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    assert (plain - want).abs().max() > 0.01 * want.abs().max()
    assert not list(out.glob("adapter*")) and not manifest.problems(out)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("gemma3", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (
            "llama",
            {
                "trainable_token_indices": {
                    "embed_tokens": [2048, 2049, 2050],
                    "lm_head": [2048, 2049, 2050],
                }
            },
        ),
    ],
    ids=["saved", "tied", "lora", "tokens"],
)
def test_added_tokens_have_the_adapters_rows(make_base, tmp_path, capsys, family, config):
    base, adapter, out = make_base(family), tmp_path / "adapter", tmp_path / "out"
    want = make_adapter(base, adapter, added=3, **config)
    merge_lora.run(str(adapter), str(out))
    assert "3 row(s) added" in capsys.readouterr().out
    assert_close(load(out)(with_added(3)).logits, want)
    assert len(AutoTokenizer.from_pretrained(out)) == 2051


def test_tokens_that_the_adapter_knows_nothing_of_get_the_mean(make_base, tmp_path, capsys):
    base, adapter, out = make_base(), tmp_path / "adapter", tmp_path / "out"
    want = make_adapter(base, adapter, modules_to_save=["lm_head"])
    tokenizer = AutoTokenizer.from_pretrained(base, chat_template="{{ messages }}")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    merge_lora.run(str(adapter), str(out))
    assert "1 token(s) of the tokenizer have no row in the adapter" in capsys.readouterr().out
    model = load(out)
    assert_close(model(IDS).logits[..., :2048], want)
    rows = model.get_output_embeddings().weight
    assert rows.shape[0] == 2049
    torch.testing.assert_close(rows[2048], rows[:2048].mean(dim=0))
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_a_quantized_base_is_written_out(make_base, tmp_path):
    full, base, adapter, out = (
        make_base(name="full", hidden_size=64),
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
    )
    AutoModelForCausalLM.from_pretrained(full).to(torch.bfloat16).save_pretrained(full)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        full, quantization_config=settings, device_map="cpu"
    )
    quantized.save_pretrained(base)
    AutoTokenizer.from_pretrained(full).save_pretrained(base)
    make_adapter(full, adapter)
    # The base that the adapter names exists, and it is a different one.
    with pytest.raises(UserError, match="not the base that"):
        merge_lora.run(str(adapter), str(out), base=str(base))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(base)})
    )
    merge_lora.run(str(adapter), str(out), dtype="float32")
    dequantized = (
        AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
        .dequantize(torch.float32)
        .float()
    )
    want = PeftModel.from_pretrained(dequantized, adapter).eval()(IDS).logits
    assert_close(load(out)(IDS).logits, want)
    assert "quantization_config" not in (out / "config.json").read_text()
    merge_lora.run(str(adapter), str(tmp_path / "usual"))
    assert load(tmp_path / "usual").dtype == torch.bfloat16


def test_a_run_its_checkpoints_and_a_base_that_has_moved(make_base, tmp_path, capsys):
    """Each checkpoint has a manifest with the identity of the base, as runs leave it.

    A damaged checkpoint is skipped.
    """
    base, run = make_base(), tmp_path / "run"
    record = {"made_with": {BASE: identify_model(str(base), weights=True)}}
    wants = {step: make_adapter(base, run / f"checkpoint-{step}") for step in (2, 10, 30)}
    for step in wants:
        checkpoint = run / f"checkpoint-{step}"
        about = {"step": step, "run": record}
        manifest.write(
            checkpoint, manifest.entries_of(checkpoint, manifest.list_saved(checkpoint)), about
        )
    with (run / "checkpoint-30" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"0")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no such folder.* or --base PATH if it has moved"):
        merge_lora.run(str(run), str(tmp_path / "out"))
    merge_lora.run(str(run), str(tmp_path / "out"), base=str(tmp_path / "moved"))
    assert (
        "checkpoint-30: passed over" in (told := capsys.readouterr().out)
        and "is taken: checkpoint-10" in told
    )
    assert_close(load(tmp_path / "out")(IDS).logits, wants[10])
    with pytest.raises(ResumeError, match=r"adapter_model.safetensors: .* bytes, not"):
        merge_lora.run(
            str(run / "checkpoint-30"), str(tmp_path / "other"), base=str(tmp_path / "moved")
        )
    with pytest.raises(
        UserError, match=r"not the base that .* was trained on, or it has changed since"
    ):
        merge_lora.run(
            str(run), str(tmp_path / "other"), base=str(make_base(initializer_range=0.1))
        )
    assert not (tmp_path / "other").exists()


def test_a_hub_name_and_a_base_beside_the_adapter(make_base, tmp_path):
    adapter = tmp_path / "models--someone--adapter" / "snapshots" / "0"
    want = make_adapter(make_base(), adapter)
    (tmp_path / "models--someone--adapter" / "refs").mkdir()
    (tmp_path / "models--someone--adapter" / "refs" / "main").write_text("0")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "../../../base"})
    )
    merge_lora.run("someone/adapter", str(tmp_path / "out"), cache_dir=str(tmp_path))
    assert_close(load(tmp_path / "out")(IDS).logits, want)


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Returns a function that gets the error of a merge that changes nothing."""

    def refused(*arguments, **flags) -> str:
        command = partial(merge_lora.run, *map(str, arguments), **flags)
        status, line = refusal(capsys, monkeypatch, command, tmp_path)
        assert status == 2
        return line

    return refused


def change_config(adapter: Path, **fields) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | fields))
    return adapter


def test_what_cannot_be_merged_is_one_line_and_nothing_is_written(make_base, tmp_path, refused):
    base, adapter, out = make_base(), tmp_path / "adapter", tmp_path / "out"
    make_adapter(base, adapter)
    assert "a whole model, no adapter: nothing to merge" in refused(base, out)
    assert "is not an empty folder" in refused(adapter, base)
    assert "give an adapter and a folder to write" in refused(adapter)
    assert "--dtype int8: choose from float32, bfloat16, float16" in refused(
        adapter, out, dtype="int8"
    )
    assert "unknown argument --dtpe; did you mean --dtype?" in refused(adapter, out, dtpe="float32")
    assert "no such folder" in refused(tmp_path / "nowhere", out)
    assert "no adapter" in refused("someone/nothing", out)
    wider = make_base(name="wider", hidden_size=48)
    assert "not the base that" in refused(adapter, out, base=str(wider))
    # now only layers and shapes are left to compare
    change_config(adapter, base_model_name_or_path="gone/away")
    assert "an adapter of another base" in refused(adapter, out, base=str(wider))
    shallower = make_base(name="shallower", num_hidden_layers=1)
    assert "it has no layer for base_model.model.model.layers.1." in refused(
        adapter, out, base=str(shallower)
    )
    change_config(adapter, base_model_name_or_path=str(base))
    assert "an adapter, no whole model" in refused(adapter, out, base=str(adapter))


def test_an_adapter_that_cannot_be_merged_is_one_line(make_base, tmp_path, refused, monkeypatch):
    base, adapter, out = make_base(), tmp_path / "adapter", tmp_path / "out"
    make_adapter(base, adapter)

    def changed(name: str, **fields) -> Path:
        return change_config(shutil.copytree(adapter, tmp_path / name), **fields)

    line = refused(changed("classes", task_type="SEQ_CLS"), out)
    assert "no causal LM" not in line and "SEQ_CLS" in line
    assert "names no base; give --base PATH" in refused(
        changed("baseless", base_model_name_or_path=None), out
    )
    prompt = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    prompt.save_pretrained(tmp_path / "prompt")
    assert "a PROMPT_TUNING adapter changes no weights" in refused(tmp_path / "prompt", out)
    pickled = changed("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in refused(pickled, out)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**30, 2**30, 2**10)
        )
        assert (
            "the merged model needs 1 MiB, and 0 MiB are free; make room, or write a smaller "
            "--dtype"
        ) in refused(adapter, out)
    (tmp_path / "out.part").mkdir()
    with pytest.raises(UserError, match=r"out\.part: left by a command that did not end"):
        merge_lora.run(str(adapter), str(out))


def test_merging_twice_is_refused(make_base, tmp_path, refused):
    base, adapter, out = make_base(), tmp_path / "adapter", tmp_path / "out"
    make_adapter(base, adapter)
    merge_lora.run(str(adapter), str(out))
    line = refused(adapter, tmp_path / "twice", base=str(out))
    assert f"{out}: already has {adapter} in it (merge.json)" in line


def test_other_logits_after_merging_or_writing_are_refused(make_base, tmp_path, monkeypatch):
    base, adapter = make_base(), tmp_path / "adapter"
    make_adapter(base, adapter)
    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
        with pytest.raises(UserError, match=r"merged, its logits differ by .*; nothing is written"):
            merge_lora.run(str(adapter), str(tmp_path / "out"))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: 1e5 * tensor for name, tensor in weights.items()},
        adapter / "adapter_model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        UserError,
        match=r"in float16 the merged model's logits are not finite; give --dtype bfloat16",
    ):
        merge_lora.run(str(adapter), str(tmp_path / "out"), dtype="float16")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_script(make_base, tmp_path, root):
    base, adapter, out = make_base(), tmp_path / "adapter", tmp_path / "out"
    # These settings are inconsistent, so they cannot be saved unchanged.
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 2}')
    want = make_adapter(base, adapter)
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(root / "merge.sh"), str(adapter), str(out), "--dtype", "bfloat16"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"merged r 4, alpha 8 into 14 layers of {base};" in done.stdout
    model = load(out)
    assert model.dtype == torch.bfloat16
    assert (model.generation_config.temperature, model.generation_config.do_sample) == (None, None)
    torch.testing.assert_close(
        model(IDS).logits.float(), want, rtol=0, atol=0.05 * want.abs().max().item()
    )
    about = json.loads((out / "merge.json").read_text())
    merged = about["merged_from"]
    assert about["adapters"] == [manifest.file_sha256(adapter / "adapter_model.safetensors")]
    assert merged["base_identity"] == identify_model(str(base)) and merged["scaling"] == [2.0]
    assert 0 < merged["logits_differ"] < 1e-5 < merged["logits_differ_written"] < 0.05
