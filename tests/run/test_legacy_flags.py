"""Tests Alpaca's published commands as they were printed.

Checks what each of their flags becomes, and that the commands train.
"""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.errors import UserError
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.run.legacy_flags import translate
from stanford_alpaca.run.model_checks import check_fit
from stanford_alpaca.run.parse import parse
from stanford_alpaca.train import train
from tests.helpers import steps
from tests.ranks import run_ranks

CLASS = "--fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer"


def config(**keys) -> str:
    return shlex.join(["--fsdp", "--fsdp_config", json.dumps(keys)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--evaluation_strategy no", "--eval_strategy no"),
        ("--evaluation-strategy=no", "--eval_strategy no"),
        ("--warmup_ratio 0.03", "--warmup_steps 0.03"),
        ("--per_gpu_train_batch_size 4", "--per_device_train_batch_size 4"),
        ("--per-gpu-eval-batch-size=4", "--per_device_eval_batch_size 4"),
        ("--gradient_checkpointing", "--activation_checkpointing"),
        ("--gradient_checkpointing False", "--activation_checkpointing False"),
        (
            "--gradient_checkpointing_kwargs '{\"a\": 1}'",
            "--activation_checkpointing_kwargs '{\"a\": 1}'",
        ),
        ("--no_cuda", "--use_cpu"),
        ("--push_to_hub_model_id me/it", "--hub_model_id me/it"),
        ("--adafactor True", "--optim adafactor"),
        ("--group_by_length", "--train_sampling_strategy group_by_length"),
        ("--include_inputs_for_metrics True", "--include_for_metrics inputs"),
        (
            f"--fsdp 'full_shard auto_wrap' {CLASS}",
            config(reshard_after_forward=True, transformer_layer_cls_to_wrap=["LlamaDecoderLayer"]),
        ),
        (
            (
                "--fsdp='full_shard auto_wrap offload' "
                f"{CLASS.replace('_', '-').replace('wrap L', 'wrap=L')}"
            ),
            config(
                reshard_after_forward=True,
                cpu_offload=True,
                transformer_layer_cls_to_wrap=["LlamaDecoderLayer"],
            ),
        ),
        ("--fsdp shard_grad_op", config(reshard_after_forward=False)),
        ("--fsdp True", "--fsdp"),
        (f"--fsdp {CLASS}", config(transformer_layer_cls_to_wrap=["LlamaDecoderLayer"])),
        (
            f"--fsdp {CLASS},Other",
            config(transformer_layer_cls_to_wrap=["LlamaDecoderLayer", "Other"]),
        ),
        (
            (
                "--fsdp 'full_shard auto_wrap' --fsdp_config '{\"fsdp_version\": 2, "
                '"reshard_after_forward": false}\''
            ),
            config(reshard_after_forward=False, version=2),
        ),
    ],
)
def test_a_flag_with_a_successor_is_read_as_it_and_says_so(old, new):
    translated, (line,) = translate(["--seed", "1", *shlex.split(old), "--logging_steps=2"])
    assert sorted(translated) == sorted(["--seed", "1", *shlex.split(new), "--logging_steps=2"])
    assert line == f"{shlex.join(shlex.split(old))} is read as {new}"
    # The parser knows the new flag.
    parse(["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", *shlex.split(new)])


@pytest.mark.parametrize(
    ("old", "why"),
    [
        (
            "--overwrite_output_dir True",
            "nothing is ever overwritten here; give a new --output_dir",
        ),
        (
            "--logging_dir logs",
            "TensorBoard's folder is the environment variable TENSORBOARD_LOGGING_DIR",
        ),
        ("--save_safetensors True", "weights are always safetensors"),
        ("--include_tokens_per_second", "supervised_tokens_per_s is always logged"),
        ("--use_mps_device", "the device is found by itself"),
        ("--half_precision_backend auto", "PyTorch's own mixed precision is the only one"),
        ("--fp16_backend amp", "PyTorch's own mixed precision is the only one"),
        ("--fp16_opt_level O1", "PyTorch's own mixed precision is the only one"),
        ("--fsdp_min_num_params 2000", "the model's own layers are wrapped, whatever their size"),
        ("--group_by_length False", "it was off"),
        ("--fsdp ''", "FSDP is off"),
        ("--fsdp=", "FSDP is off"),
        ("--fsdp no_shard", "FSDP is off"),
        (CLASS, "FSDP is off"),
        ("--tf32 True", "TF32 needs a CUDA GPU, Ampere or newer"),
        ("--tf32=1", "TF32 needs a CUDA GPU, Ampere or newer"),
    ],
)
def test_a_flag_without_meaning_is_dropped_and_says_why(old, why):
    translated, (line,) = translate(["--seed", "1", *shlex.split(old), "--bf16"], has_tf32=False)
    assert translated == ["--seed", "1", "--bf16"]
    assert line == f"{shlex.join(shlex.split(old))} is dropped: {why}"


def test_the_words_of_transformers_5_stay_as_they_are():
    argv = shlex.split(
        "--learning_rate -1 --fsdp --fsdp_config file.json --bf16=True --tf32 True "
        "--report_to all --tf32 False"
    )
    assert translate(argv) == (argv, [])
    assert translate(["--tf32", "False"], has_tf32=False) == (["--tf32", "False"], [])


def test_an_fsdp_config_in_a_file_is_merged(tmp_path):
    (tmp_path / "fsdp.json").write_text(
        '{"fsdp_backward_prefetch": "backward_pre", "activation_checkpointing": true}'
    )
    new, _ = translate(
        ["--fsdp", "full_shard auto_wrap", "--fsdp_config", str(tmp_path / "fsdp.json")]
    )
    want = {
        "reshard_after_forward": True,
        "backward_prefetch": "backward_pre",
        "activation_checkpointing": True,
    }
    assert new[:2] == ["--fsdp", "--fsdp_config"] and json.loads(new[2]) == want


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("--fsdp hybrid_shard", "--fsdp hybrid_shard: choose from full_shard"),
        ("--fsdp full_shard --fsdp_config none.json", "--fsdp_config none.json: no JSON object"),
        ("--fsdp full_shard --fsdp_config '{'", "--fsdp_config {: no JSON object"),
        ("--fsdp full_shard --fsdp_config '[1]'", "no JSON object"),
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5: give a share of the steps below 1"),
    ],
)
def test_a_value_without_counterpart_is_an_error(old, message):
    with pytest.raises(UserError) as error:
        translate(shlex.split(old))
    assert message in str(error.value)


def test_a_removed_flag_without_successor_is_unknown():
    with pytest.raises(UserError, match="unknown argument --sharded_ddp"):
        parse(
            [
                "--model_name_or_path",
                "m",
                "--data_path",
                "d",
                "--output_dir",
                "o",
                "--sharded_ddp",
                "simple",
            ]
        )


# Alpaca's README, section Fine-tuning. Only the parts in <> there are filled in. {engine} stands
# for the engine's flags.
ALPACA = """torchrun --nproc_per_node=2 --master_port={port} train.py \\
    --model_name_or_path {model} \\
    --data_path ./alpaca_data.json \\
    --bf16 True \\
    --output_dir {out} \\
    --num_train_epochs 3 \\
    --per_device_train_batch_size 4 \\
    --per_device_eval_batch_size 4 \\
    --gradient_accumulation_steps 8 \\
    --evaluation_strategy "no" \\
    --save_strategy "steps" \\
    --save_steps 2000 \\
    --save_total_limit 1 \\
    --learning_rate 2e-5 \\
    --weight_decay 0. \\
    --warmup_ratio 0.03 \\
    {engine} \\
    --tf32 True"""
FSDP = (
    '--lr_scheduler_type "cosine" --logging_steps 1 --fsdp "{fsdp}" '
    "--fsdp_transformer_layer_cls_to_wrap '{layer}'"
)
# --logging_steps is added, so that there are losses to check.
DEEPSPEED = """--deepspeed "./configs/default_offload_opt_param.json" --logging_steps 1"""


@pytest.fixture
def run_alpaca(root, tmp_path, monkeypatch):
    """Runs the published command with 24 records.

    It runs in a folder where train.py is the package's. With ``warm``, the processes that torchrun
    would start are forked from one that has imported everything.
    """
    monkeypatch.chdir(tmp_path)
    records = json.loads((root / "data" / "instructions" / "train.json").read_text())[:24]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(records))
    (tmp_path / "train.py").symlink_to(root / "stanford_alpaca" / "train.py")

    def run(model, engine, warm=False):
        port = 20000 + os.getpid() % 10000
        command = ALPACA.format(port=port, model=model, out=tmp_path / "out", engine=engine)
        if warm:
            launcher, _, flags = command.replace("\\\n", "").partition("train.py")
            assert "--nproc_per_node=2" in launcher
            run_ranks(2, train, shlex.split(flags))
            return check_saved()
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        check_saved()
        return done.stdout

    def check_saved():
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    return run


def equals_one_process(tmp_path, model):
    """Compares the run's steps and model with one process in bfloat16.

    That process sees the same global batch.
    """
    flags = ["--model_name_or_path", str(model), "--data_path", str(tmp_path / "alpaca_data.json")]
    flags += shlex.split(
        "--bf16 True --per_device_train_batch_size 8 --gradient_accumulation_steps 8 "
        "--num_train_epochs 3"
    )
    flags += shlex.split(
        "--learning_rate 2e-5 --warmup_steps 0.03 --lr_scheduler_type cosine --logging_steps 1"
    )
    train(
        [
            *flags,
            "--output_dir",
            str(tmp_path / "one"),
            "--save_strategy",
            "no",
            "--disable_tqdm",
            "True",
        ]
    )
    assert len(steps(tmp_path / "one")) == 3
    for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / "out"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)
        assert one["learning_rate"] == two["learning_rate"]
    # Only FSDP writes this for resuming.
    assert list((tmp_path / "out" / "checkpoint-3").glob("pytorch_model_fsdp*"))


def test_alpacas_llama_command_as_printed(run_alpaca, tmp_path, root):
    layer = "LlamaDecoderLayer"
    printed = run_alpaca(
        root / "data" / "tiny-base", FSDP.format(fsdp="full_shard auto_wrap", layer=layer)
    )
    lines = [line for line in printed.splitlines() if line.startswith("--")]
    assert [line.split()[0] for line in lines] == [
        "--evaluation_strategy",
        "--warmup_ratio",
        "--tf32",
        "--fsdp",
    ]
    assert "64 examples a step: " in printed and "on each of 2 process(es)" in printed
    equals_one_process(tmp_path, root / "data" / "tiny-base")


@pytest.fixture
def tiny_opt(root, tmp_path):
    """A random OPT. FSDP2 warns about views that its layers return."""
    shape = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    options = AutoConfig.for_model(
        "opt", vocab_size=2048, max_position_embeddings=512, dropout=0.0, **shape
    )
    AutoModelForCausalLM.from_config(options).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


def test_alpacas_opt_command_as_printed_and_its_offload_variant(run_alpaca, tmp_path, tiny_opt):
    run_alpaca(
        tiny_opt,
        FSDP.format(fsdp="full_shard auto_wrap offload", layer="OPTDecoderLayer"),
        warm=True,
    )
    equals_one_process(tmp_path, tiny_opt)


def test_alpacas_deepspeed_command_as_printed(run_alpaca, tmp_path, root):
    """Uses ZeRO-3 with both offloads and all else from the command line, like Alpaca's file.

    Only ``torch_adam`` is added for this test: compiling DeepSpeed's CPU optimizer would take
    minutes.
    """
    auto = dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto")
    warmup = dict.fromkeys(
        ["total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"], "auto"
    )
    sizes = [
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    ]
    offload = {"device": "cpu", "pin_memory": True}
    zero = {
        "stage": 3,
        "offload_optimizer": offload,
        "offload_param": offload,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "contiguous_gradients": True,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": False,
        **dict.fromkeys(sizes, "auto"),
    }
    batch = [
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ]
    content = {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": auto | {"torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": warmup},
        "zero_optimization": zero,
        "steps_per_print": 5,
        "wall_clock_breakdown": False,
        **dict.fromkeys(batch, "auto"),
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default_offload_opt_param.json").write_text(json.dumps(content))
    run_alpaca(root / "data" / "tiny-base", DEEPSPEED, warm=True)
    first, *_, last = steps(tmp_path / "out")
    assert (first["step"], last["step"]) == (1, 3)
    assert first["loss"] == pytest.approx(2.977, rel=2e-3)  # the same as with FSDP
    # DeepSpeed's warm-up leaves one step at 2e-5, and the size of Adam's first step is the learning
    # rate. Training starts from bfloat16 weights.
    before = (
        load_file(root / "data" / "tiny-base" / "model.safetensors")["model.embed_tokens.weight"]
        .bfloat16()
        .float()
    )
    after = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert (after - before).abs().max().item() == pytest.approx(2e-5, rel=0.01)
    # Each rank writes a shard.
    assert list((tmp_path / "out" / "checkpoint-3").glob("global_step3/zero_pp_rank_1*"))


def test_a_layer_the_model_does_not_have_is_one_line(tmp_path, tiny_opt):
    argv = [
        "--model_name_or_path",
        str(tiny_opt),
        "--data_path",
        "data.json",
        "--fsdp",
        "full_shard auto_wrap",
    ]
    with pytest.raises(UserError) as error:
        run = parse([*argv, "--output_dir", str(tmp_path / "out"), *CLASS.split()])
        check_fit(run, ModelSource(str(tiny_opt)).tokenizer(), [])
    assert "LlamaDecoderLayer: the model has no such layer; its own: OPTDecoderLayer" in str(
        error.value
    )
    assert not (tmp_path / "out").exists()
