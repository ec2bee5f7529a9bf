"""Tests that impossible flags, models and machines end a run before a model is loaded.

The command ends with status 2 and one line, and nothing is written.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, get_constant_schedule

from stanford_alpaca import generate, preview
from stanford_alpaca.checkpoint import space
from stanford_alpaca.evaluation import metrics
from stanford_alpaca.preflight.__main__ import run as estimate
from stanford_alpaca.train import train
from tests.helpers import refusal
from tests.ranks import run_ranks


@pytest.fixture
def here(tmp_path, monkeypatch, root):
    """Makes a working folder with models that have different faults.

    None of them has weights that could be loaded.
    """
    monkeypatch.chdir(tmp_path)
    base = root / "data" / "tiny-base"
    config = json.loads((base / "config.json").read_text())

    def model(name: str, weights: str = "model.safetensors", **changes) -> Path:
        (tmp_path / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / file, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        (tmp_path / name / weights).write_bytes(pickle.dumps(Payload("ran")))
        return tmp_path / name

    model("pickled", "pytorch_model.bin")
    model("sharded", "pytorch_model-00001-of-00002.bin")
    model("small", vocab_size=2000)
    model("grown", vocab_size=2048)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "grown")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model("coded", model_type="own", auto_map=own) / "own.py").write_text(
        f"# {tmp_path}: another module in every test, or it would run once\n{OWN}"
    )
    (tmp_path / "broken.json").write_text('[{"instruction": "a", ')
    (tmp_path / "field.json").write_text(
        '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]'
    )
    (tmp_path / "ds.json").write_text('{\n  "zero_optimization": {"stage": 2},,\n}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    return tmp_path


OWN = """\
from transformers import LlamaConfig, LlamaForCausalLM
open("ran", "w").close()
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


class Payload:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, file: str):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        # ---- numbers and words
        (
            {},
            ["--learning_rat", "1"],
            "unknown argument --learning_rat; did you mean --learning_rate",
        ),
        ({"mode": "emoo"}, [], "invalid choice: 'emoo'"),
        ({"learning_rate": 0}, [], "--learning_rate 0.0: give a number above 0"),
        ({"learning_rate": -1}, [], "--learning_rate -1.0: give"),
        ({"learning_rate": "nan"}, [], "--learning_rate nan: give"),
        ({"learning_rate": "fast"}, [], "invalid float value: 'fast'"),
        ({"seed": -1}, [], "--seed -1"),
        ({"per_device_train_batch_size": 0}, [], "--per_device_train_batch_size 0: give 1 or more"),
        (
            {"global_batch": None, "gradient_accumulation_steps": 0},
            [],
            "--gradient_accumulation_steps 0",
        ),
        ({"gradient_accumulation_steps": 3}, [], "asks for --gradient_accumulation_steps 4"),
        (
            {"global_batch": 10},
            [],
            "--global_batch 10 is no multiple of 4, the examples of 1 process.es. with 4 each; "
            "--per_device_train_batch_size 2 fits",
        ),
        (
            {"global_batch": 10, "per_device_train_batch_size": 2**31 - 1},
            [],
            "--per_device_train_batch_size 1 fits",
        ),
        ({"bf16": True}, ["--fp16"], "fp16.*bf16"),
        ({"model_max_length": 4096}, [], "more than the model's 1024 positions; give"),
        ({"model_max_length": 16}, [], "no example has a token to train on"),
        ({"eval_fraction": 1.5}, [], "--eval_fraction 1.5"),
        ({"eval_fraction": 0.001}, [], "leaves one side empty"),
        ({"eval_strategy": "epoch"}, [], "--eval_strategy epoch needs --eval_path"),
        ({"label_smoothing_factor": 0.1}, [], "--label_smoothing_factor"),
        ({"average_tokens_across_devices": False}, [], "--average_tokens_across_devices"),
        ({"enable_jit_checkpoint": True}, [], "would .*; drop it"),
        ({"save_on_each_node": True}, [], "would .*; drop it"),
        ({"report_to": "wandbb"}, [], "--report_to"),
        ({"report_to": "comet_ml"}, [], "--report_to: .*comet"),
        ({"fp16": True}, [], "--fp16 needs a GPU; on a CPU choose --bf16, or neither"),
        (
            {"dataloader_drop_last": True},
            [],
            "--dataloader_drop_last True: would change nothing: .*; drop it",
        ),
        ({"bf16_full_eval": True}, [], "--bf16_full_eval True: would round the weights"),
        (
            {"auto_find_batch_size": True},
            [],
            "--auto_find_batch_size True: would train with another batch",
        ),
        ({"ignore_data_skip": True}, [], "--ignore_data_skip True: would repeat examples"),
        ({"do_predict": True}, [], "--do_predict True: would change nothing"),
        ({"remove_unused_columns": True}, [], "--remove_unused_columns True: would take away"),
        (
            {"average_tokens_across_devices": False},
            [],
            "--average_tokens_across_devices False: would train something else",
        ),
        ({"label_names": "labels"}, [], "--label_names .*: would change nothing"),
        (
            {"accelerator_config": '{"split_batches": true}'},
            [],
            "--accelerator_config split_batches True: would change what a",
        ),
        (
            {"optim": "sgd", "adam_beta1": 0.5},
            [],
            "--adam_beta1 would change nothing for --optim sgd: drop it",
        ),
        (
            {"optim_args": "a=b"},
            [],
            "--optim_args would change nothing for --optim adamw_torch_fused: drop it",
        ),
        (
            {"attn_implementation": "spda"},
            [],
            "--attn_implementation spda: choose from .*; did you mean sdpa",
        ),
        (
            {"attn_implementation": "flash_attention_2"},
            [],
            "--attn_implementation flash_attention_2 needs an NVIDIA GPU",
        ),
        (
            {"lora_target_parameters": "experts.down_proj"},
            [],
            "--lora_target_parameters needs --lora",
        ),
        (
            {"lora": True, "lora_target_parameters": "experts.x"},
            [],
            "experts.x: no weights of experts .*: it has none",
        ),
        (
            {"dataloader_persistent_workers": True},
            [],
            "--dataloader_persistent_workers needs --dataloader_num_workers",
        ),
        ({"torch_compile_backend": "foo"}, [], "--torch_compile_backend foo: choose from"),
        # ---- data
        ({"data_path": "none.json"}, [], "none.json: no such file"),
        ({"data_path": "x" * 5000 + ".json"}, [], "File name too long; give another"),
        ({"data_path": "broken.json"}, [], "broken JSON"),
        ({"data_path": "field.json"}, [], "record 2: no field 'output'"),
        ({"eval_path": "none.json"}, [], "none.json: no such file"),
        (
            {"data_weights": 0.5},
            ["--data_path", "broken.json", "broken.json"],
            "--data_weights .* for each of the 2",
        ),
        ({"data_weights": -1}, [], "--data_weights"),
        ({"columns": "instruction"}, [], "--columns instruction: write OURS=THEIRS"),
        (
            {"columns": "instuction=x"},
            [],
            "instuction is no column of ours; did you mean instruction",
        ),
        ({"columns": "output=answer"}, [], "--columns output=answer: there is no 'answer'"),
        ({"prompt_template": "chat"}, [], "the tokenizer has no chat template"),
        ({"streaming": True, "max_steps": -1}, [], "--streaming needs --max_steps"),
        ({"streaming": True}, [], "a JSON list has to be read as a whole"),
        (
            {"streaming": True, "eval_fraction": 0.1},
            [],
            "--streaming and --eval_fraction exclude each other",
        ),
        ({"shuffle_buffer": 0}, [], "--shuffle_buffer 0"),
        ({"sample_steps": 2}, [], "--sample_steps needs --sample_prompts"),
        ({"sample_prompts": "none.txt"}, [], "none.txt: no such file"),
        (
            {"sample_prompts": "long.txt"},
            [],
            "prompt 2 has .* tokens; the model's context leaves room for",
        ),
        # ---- models
        ({"model_name_or_path": None}, [], "model_name_or_path"),
        (
            {"model_name_or_path": "./none"},
            [],
            "none: cannot load a model from here .no such folder.; give",
        ),
        (
            {"model_name_or_path": "no/such-model-here"},
            [],
            "no/such-model-here: cannot load a model.*; give",
        ),
        ({"model_name_or_path": "full"}, [], "full: cannot load a model.*; give"),
        (
            {"model_name_or_path": "coded"},
            [],
            "coded: .*it runs code of its own.*; read that code, .*--trust_remote_code",
        ),
        (
            {"teacher": "coded"},
            [],
            "coded: .*it runs code of its own.*; read that code, .*--trust_remote_code",
        ),
        (
            {"model_name_or_path": "pickled"},
            [],
            r"pickled: pytorch_model.bin is a pickle.*; .* convert it once: python -c",
        ),
        (
            {"model_name_or_path": "sharded"},
            [],
            r"sharded: pytorch_model-00001-of-00002.bin is a pickle",
        ),
        (
            {"model_name_or_path": "small"},
            [],
            "small: its tokenizer has 2048 tokens, its embedding 2000 rows.*; put",
        ),
        (
            {"model_name_or_path": "grown", "lora": True},
            [],
            "--lora trains no embedding, and 3 of the tokenizer's tokens",
        ),
        (
            {"lora": True},
            ["--lora_target_modules", "q_prj"],
            "q_prj: no linear layer.*did you mean q_proj",
        ),
        ({"teacher": "./none"}, [], "none: cannot load a model"),
        ({"teacher": "BASE", "mode": "dft"}, [], "--teacher: mode dft"),
        ({"teacher": "BASE", "teacher_top_k": 0}, [], "--teacher_top_k 0"),
        ({"from_config": True}, [], "a random output layer prices nothing; make a cost embedding"),
        ({"cost": "froze"}, [], "--cost froze: not frozen, not adaptive, no file, and no model"),
        ({"cost_seed": 2}, [], "--cost_seed 2 belongs to --cost_kind shuffled"),
        ({"detokenize": True}, [], "--detokenize are about running text"),
        ({"cost": "none.safetensors"}, [], "--cost none.safetensors"),
        ({"cost": "broken.json", "cost_kind": "identity"}, [], "needs no embedding"),
        ({"cost_cache_mib": -1}, [], "--cost_cache_mib -1"),
        (
            {"cost_cache_mib": 1, "cost": "adaptive"},
            [],
            "--cost_cache_mib: an adaptive",
        ),
        ({"loss_backend": "triton"}, [], "--loss_backend triton needs an NVIDIA GPU"),
        ({"mode": "dft", "emo_weighting": "upstream"}, [], "belongs to the modes emo and emo2"),
        ({"mode": "mix", "emo_weight": 2}, [], "emo_weight is 2.0"),
        # ---- engines
        ({}, ["--fsdp"], "--fsdp needs a launcher"),
        (
            {},
            ["--fsdp", "--deepspeed", "full"],
            "--fsdp and --deepspeed exclude each other; drop one",
        ),
        ({}, ["--deepspeed", "BASE/config.json"], "--deepspeed needs a launcher"),
        ({}, ["--deepspeed", "none.json"], "--deepspeed none.json: no such file; give"),
        (
            {},
            ["--deepspeed", "ds.json"],
            "--deepspeed ds.json: broken JSON at line 2 column 37, .*; mend",
        ),
        ({}, ["--deepspeed", "{1}"], "--deepspeed .1.: broken JSON at line 1 column 2, .*; mend"),
        ({}, ["--deepspeed", "broken.json"], "--deepspeed broken.json: broken JSON"),
        ({}, ["--deepspeed", "list.json"], "--deepspeed list.json: a list, wanted an object.*; "),
        ({"engine": "zero2"}, [], "--engine zero2 needs a launcher"),
        ({"engine": "ddp"}, [], "--engine ddp needs at least 2 processes"),
        (
            {"engine": "fsdp"},
            ["--deepspeed", "x.json"],
            "--engine fsdp and --deepspeed exclude each other",
        ),
        ({"engine": "zero2"}, ["--fsdp"], "--engine zero2 and --fsdp exclude each other"),
        ({"accelerator_config": '{"foo": true}'}, [], "unexpected keyword argument 'foo'"),
        # ---- output and hub
        ({"output_dir": "full"}, [], "is not empty"),
        ({"output_dir": "broken.json"}, [], "is a file"),
        ({"output_dir": "broken.json/x"}, [], "is a file"),
        ({"output_dir": "/proc/none"}, [], "/proc cannot be written to .*; give another"),
        ({"resume_from_checkpoint": "none"}, [], "not a checkpoint"),
        ({"resume_from_checkpoint": "True"}, [], "no checkpoint in"),
        ({"resume_from_checkpoint": "False", "output_dir": "full"}, [], "is not empty"),
        ({"push_to_hub": True}, [], "--push_to_hub: the hub does not know you"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list | dict) else None,
)
def test_what_cannot_be_is_one_line(
    arguments, here, root, monkeypatch, capsys, changes, flags, message
):
    Path("long.txt").write_text("Name a bird.\n" + "word " * 1100)
    Path("list.json").write_text("[]")
    base = str(root / "data" / "tiny-base")
    changes = {name: base if value == "BASE" else value for name, value in changes.items()}
    flags = [flag.replace("BASE", base) for flag in flags]
    status, line = refusal(
        capsys,
        monkeypatch,
        lambda: train(arguments(*flags, **changes)),
        here / "out",
        here / "full",
    )
    assert status == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)
    assert not (here / "ran").exists()


# ---- what depends on the machine -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "moments"),
    [
        ({}, 2),
        ({"optim": "sgd"}, None),
        ({"save_only_model": True}, None),
        ({"lora": True}, None),
        ({"save_strategy": "no"}, None),
    ],
    ids=str,
)
def test_the_disk_has_room_for_two_checkpoints(
    arguments, here, root, monkeypatch, capsys, changes, moments
):
    usage = type("Usage", (), {"free": 20 * 2**20})()
    monkeypatch.setattr(
        space.shutil, "disk_usage", lambda place: usage if place == here / "out" else 1 / 0
    )
    argv = arguments(**{"save_strategy": "steps", "data_path": "broken.json"} | changes)
    status, line = refusal(capsys, monkeypatch, lambda: train(argv), here / "out")
    assert status == 2
    if moments is None:
        assert line.startswith("broken.json")  # this check comes after the one for disk space
    else:
        weights = load_file(root / "data" / "tiny-base" / "model.safetensors").values()
        mib = 2 * (1 + moments) * 4 * sum(tensor.numel() for tensor in weights) / 2**20
        assert (
            f"room for two checkpoints needs {mib:,.0f} MiB, and 20 MiB are free; make room" in line
        )


def test_what_a_checkpoint_takes():
    assert [
        space.checkpoint_bytes(10, name) for name in ("adamw_torch", "adamw_bnb_8bit", "adafactor")
    ] == [120, 40, 40]
    assert space.checkpoint_bytes(10, "adamw_torch_fused", only_model=True) == 40


def test_a_hub_that_refuses_connections_is_one_line(arguments, here, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    # no waiting between retries
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    argv = arguments(model_name_or_path="no/such-model-here", cache_dir=here / "hub")
    status, line = refusal(capsys, monkeypatch, lambda: train(argv), here / "out")
    assert status == 2 and "no/such-model-here: cannot load a model" in line


def contradiction(argv: list[str]) -> str:
    try:
        train(argv)
    except ValueError as error:
        return str(error)
    return ""


def test_a_deepspeed_file_that_contradicts_the_flags(arguments, here):
    Path("ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 7})
    )
    (line,) = run_ranks(1, contradiction, arguments("--deepspeed", "ds.json"))
    assert (
        line.startswith("--deepspeed contradicts the flags: ds gradient_accumulation_steps=7 vs")
        and "; " in line
    )
    assert "\n" not in line and not Path("out").exists()


# ---- what is made to fit, and said ---------------------------------------------------------------


def test_missing_tokens_are_added_and_said(arguments, here, monkeypatch, capsys):
    # The run gets as far as making the model.
    monkeypatch.setattr("stanford_alpaca.train.make_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(arguments(model_name_or_path="grown"))
    printed = capsys.readouterr().out
    assert "grown: the tokenizer has no eos_token: </s> is one now" in printed
    assert "grown: the tokenizer has no pad_token: [PAD] is one now" in printed
    assert "grown: the embedding grows from 2048 rows to the tokenizer's 2051" in printed


# ---- code and weights of others ------------------------------------------------------------------


def commands(model: str) -> dict[str, object]:
    ask = {"instruction": "a"}
    return {
        "generate": lambda **flags: generate.run(model, **ask, **flags),
        "metrics": lambda **flags: metrics.run(model, data="field.json", limit=1, **flags),
        "preview": lambda **flags: preview.run(model, data="field.json", **flags),
        "preflight": lambda **flags: estimate(model_name_or_path=model, **flags),
    }


@pytest.mark.parametrize("name", ["generate", "metrics", "preview", "preflight"])
def test_no_command_runs_a_models_code_unasked(here, monkeypatch, capsys, name):
    status, line = refusal(capsys, monkeypatch, commands("coded")[name], here / "coded")
    assert status == 2 and "it runs code of its own" in line and "--trust_remote_code" in line
    assert not (here / "ran").exists()


@pytest.mark.parametrize("name", ["generate", "metrics"])
def test_no_command_reads_pickled_weights(here, monkeypatch, capsys, name):
    status, line = refusal(capsys, monkeypatch, commands("pickled")[name], here / "pickled")
    assert status == 2 and "is a pickle" in line
    assert not (here / "ran").exists()


def test_code_that_is_trusted_runs_and_is_named(arguments, here, root, capsys):
    shutil.copy(root / "data" / "tiny-base" / "model.safetensors", here / "coded")
    train(arguments("--trust_remote_code", model_name_or_path="coded", max_steps=1))
    assert (
        "--trust_remote_code: coded: own.py runs here, with your rights" in capsys.readouterr().out
    )
    assert (here / "ran").exists() and (here / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["generate", "metrics"])
def test_an_adapter_of_another_base(here, root, make_model, monkeypatch, capsys, name):
    model = make_model("llama", vocab_size=2048)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(here / "adapter")
    file = here / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text())
            | {"base_model_name_or_path": str(root / "data" / "tiny-base")}
        )
    )
    status, line = refusal(capsys, monkeypatch, commands("adapter")[name], here / "adapter")
    assert (
        status == 2
        and line.startswith("adapter: an adapter of another base than")
        and "wanted [8, 160]; mend" in line
    )


@pytest.mark.parametrize("name", ["generate", "metrics"])
def test_a_prompt_longer_than_the_context(here, root, monkeypatch, capsys, name):
    base = str(root / "data" / "tiny-base")
    Path("long.json").write_text(json.dumps([{"instruction": "word " * 1100, "output": "b"}]))
    command = {
        "generate": lambda: generate.run(base, prompts="long.json", out="out.jsonl"),
        "metrics": lambda: metrics.run(base, data="long.json", out="out"),
    }[name]
    status, line = refusal(capsys, monkeypatch, command, here / "out", here / "out.jsonl")
    assert status == 2 and "prompt 1 has" in line and "the model's context leaves room for" in line


# ---- secrets -------------------------------------------------------------------------------------


def constant(trainer, num_training_steps, optimizer=None):
    trainer.lr_scheduler = get_constant_schedule(trainer.optimizer)
    return trainer.lr_scheduler


def test_secrets_are_in_no_file_and_no_line(arguments, tmp_path, monkeypatch, capfd):
    token, key, pasted = (
        "a-made-up-hub-token",
        "made-up-wandb-key-0123456789",
        "hf_abcdefghijklmnopqrstuvwxyz0123",
    )
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HF_TOKEN", "another-made-up-token-value")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "out" / "board"))
    argv = arguments(
        "--hub_token",
        token,
        "--report_to",
        "tensorboard",
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
        run_name=f"of-{token}-{pasted}",
        project="https://me:hunter2-hunter2@tracker/x?api_key=made-up-query",
        lr_scheduler_kwargs='{"api_key": "made-up-setting"}',
        lr_scheduler_type="cosine",
    )
    with monkeypatch.context() as patch:  # the schedule takes no such setting
        patch.setattr("stanford_alpaca.run.flag_checks.check_optimizer", lambda training: None)
        patch.setattr("transformers.Trainer.create_scheduler", constant)
        train(argv)
    with pytest.raises(SystemExit):
        from stanford_alpaca.errors import UserError
        from stanford_alpaca.flags import exit_on_user_error

        def fail():
            raise UserError(
                f"https://me:{token}@hub/x {key} {pasted} {os.environ['HF_TOKEN']} "
                "https://you:pass@hub"
            )

        exit_on_user_error(fail)
    printed = "".join(capfd.readouterr())
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 10 and "https://***@hub" in printed
    assert "run_name: of-***-***" in (tmp_path / "out" / "run.yaml").read_text()
    hidden = ("you:pass", "hunter2", "made-up-query", "made-up-setting")
    for secret in (token, key, pasted, os.environ["HF_TOKEN"], *hidden):
        assert secret not in printed
        assert not [file for file in files if secret.encode() in file.read_bytes()]


def test_a_secret_in_the_name_of_data_is_in_no_file(arguments, tmp_path):
    token = "hf_abcdefghijklmnopqrstuvwxyz0123"
    data = shutil.copy(tmp_path / "train.json", tmp_path / f"of-{token}.json")
    train(arguments(data_path=data, max_steps=1))
    assert "| of-***.json |" in (tmp_path / "out" / "README.md").read_text()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in files if token.encode() in file.read_bytes()]
