"""Tests engines.

Checks what FSDP shards and in which precision it computes. If the active engine is not the
requested one, that is an error.
"""

import os
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.distributed.engine import ENGINES
from stanford_alpaca.errors import UserError
from stanford_alpaca.run.arguments import TrainingArguments
from stanford_alpaca.training import engines
from stanford_alpaca.training.engines import check_engine, engine_flags
from stanford_alpaca.training.fsdp import activate_fsdp, layer_classes
from tests.helpers import steps
from tests.ranks import run_ranks


class Stack(nn.Module):
    """Two modules of one class, without any hint that they are layers."""

    _no_split_modules = None

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])

    def get_output_embeddings(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_decoder_layers_are_found_without_naming_a_class(make_model):
    model = make_model("llama")
    assert layer_classes(model) == ["LlamaDecoderLayer"]
    model._no_split_modules = {"LlamaDecoderLayer", "VisionLayer"}  # this model has no VisionLayer
    assert layer_classes(model) == ["LlamaDecoderLayer"]
    model._no_split_modules = None
    assert layer_classes(model) == ["LlamaDecoderLayer"]
    assert layer_classes(model, ["LlamaMLP"]) == ["LlamaMLP"]
    assert layer_classes(Stack()) == ["Linear"]
    with pytest.raises(UserError, match="no stack of layers"):
        layer_classes(
            Stack().blocks[0].apply(lambda module: setattr(module, "_no_split_modules", None))
        )


def test_an_engine_that_is_not_active_is_an_error():
    arguments = {"engine": None, "fsdp": None, "deepspeed": None}
    for asked in ({}, {"engine": "none"}):
        check_engine(
            SimpleNamespace(args=SimpleNamespace(**arguments | asked), model_wrapped=Stack())
        )
    for asked in ({"fsdp": True}, *({"engine": engine} for engine in ENGINES if engine != "none")):
        with pytest.raises(UserError, match=r"was asked for, but the active one is none"):
            check_engine(
                SimpleNamespace(args=SimpleNamespace(**arguments | asked), model_wrapped=Stack())
            )


def test_a_zero_engine_without_its_file_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "PACKAGE", tmp_path)
    with pytest.raises(
        UserError, match=r"--engine zero2: no .*ds_configs/zero2.json; .* give --deepspeed FILE"
    ):
        engine_flags("zero2", None, None)


def filled_in(folder: str) -> list[int]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    os.environ["TORCH_EXTENSIONS_DIR"] = f"{folder}/compiled"
    args = TrainingArguments(
        output_dir=folder, engine="zero2", per_device_train_batch_size=2, global_batch=16
    )
    deepspeed.init_distributed("gloo")  # as DeepSpeed's engine does
    assert get_accelerator().device_count() == 2 and torch.distributed.get_world_size() == 2
    config = args.hf_deepspeed_config.config
    return [
        config[name]
        for name in (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "train_batch_size",
        )
    ]


def test_deepspeed_knows_what_the_global_batch_makes_of_the_accumulation_and_compiles_nothing(
    tmp_path,
):
    assert run_ranks(2, filled_in, str(tmp_path)) == [[2, 4, 16]] * 2
    assert not (tmp_path / "compiled").exists()


def sharded_step(folder: str) -> tuple:
    """Runs one step of FSDP2 in bf16 on this rank.

    Returns the output, the first layer's whole gradient and weight, their dtypes, and whether each
    layer is an FSDP unit.
    """
    from accelerate import Accelerator
    from torch.distributed.fsdp import FSDPModule

    args = TrainingArguments(output_dir=folder, engine="fsdp", bf16=True)
    model = Stack()
    for block in model.blocks:
        nn.init.constant_(block.weight, 1 + 2**-9)  # 1 in bfloat16
    accelerator = Accelerator(mixed_precision="bf16")
    activate_fsdp(SimpleNamespace(args=args, model=model, accelerator=accelerator))
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    x = torch.tensor([[1.0, 0.0]]) if args.process_index == 0 else torch.tensor([[2**-9, 0.0]])
    with torch.autocast("cpu", enabled=False):
        y = model(x)
    y.sum().backward()
    weight = model.blocks[0].weight
    gradient, master = weight.grad.full_tensor(), weight.full_tensor()
    units = [isinstance(block, FSDPModule) for block in model.blocks]
    return (
        y.tolist(),
        gradient.tolist(),
        master.tolist(),
        str(gradient.dtype),
        str(master.dtype),
        units,
    )


def test_fsdp_computes_in_bf16_with_float32_masters_and_sums(tmp_path):
    for rank, (y, gradient, master, *dtypes, units) in enumerate(
        run_ranks(2, sharded_step, str(tmp_path))
    ):
        assert y == [[2 * 2.0 ** (-9 * rank)] * 2]  # the weights are 1 in bfloat16
        # The mean of 2 and 2^-8. In bfloat16 it would be 1.
        assert gradient == [[1 + 2**-9, 0.0]] * 2
        assert master == [[1 + 2**-9] * 2] * 2
        assert dtypes == ["torch.float32"] * 2 and units == [True, True]


def counted_run(argv: list[str]) -> int:
    """Trains and returns how often a layer's MLP was computed."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    from stanford_alpaca.train import train

    calls, forward = [], GPT2MLP.forward

    def counting(self, *args):
        calls.append(1)
        return forward(self, *args)

    GPT2MLP.forward = counting
    train(argv)
    return len(calls)


def test_fsdp_recomputes_layers_with_the_same_dropout(arguments, tmp_path, root):
    # GPT-2's default dropout is 0.1.
    config = AutoConfig.for_model(
        "gpt2", vocab_size=2048, n_embd=32, n_layer=2, n_head=4, n_positions=512
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(tmp_path / "gpt2")
    settings = {"model_name_or_path": tmp_path / "gpt2", "engine": "fsdp", "max_steps": 2}
    plain = run_ranks(2, counted_run, arguments(output_dir=tmp_path / "plain", **settings))
    again = run_ranks(
        2,
        counted_run,
        arguments(output_dir=tmp_path / "again", activation_checkpointing=True, **settings),
    )
    micro_batches = 2 * 2  # steps times accumulation
    assert plain[0] < again[0] == plain[0] + micro_batches * config.n_layer
    for one, two in zip(steps(tmp_path / "plain"), steps(tmp_path / "again"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    recorded = yaml.safe_load((tmp_path / "again" / "run.yaml").read_text())
    assert (recorded["engine"], recorded["activation_checkpointing"]) == ("fsdp", True)
