"""Tests LoRA: what is trained and written, and that peft loads it, with every engine."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.export import export
from stanford_alpaca.cost import CostAlias, CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.losses import emo_loss
from stanford_alpaca.losses.backends import chunked
from stanford_alpaca.merge_lora import run as merge
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.models.lora import add_lora
from stanford_alpaca.objective.attach import attach_objective
from stanford_alpaca.objective.head import original_weight
from stanford_alpaca.run.adapter import told_adapter
from stanford_alpaca.run.build import precision
from stanford_alpaca.run.parse import parse
from stanford_alpaca.train import train
from stanford_alpaca.training.hardware import training_flops
from tests.helpers import evaluations, steps
from tests.ranks import run_ranks

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def nll_of(model, tokenizer, held: Path, max_length: int = 512) -> float:
    """Returns the mean nll of the targets by the model's own loss, one record at a time."""
    examples, _ = tokenize_records(
        load_records(str(held), str(held.parent / "cache")), tokenizer, max_length
    )
    nll, tokens = 0.0, 0
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        nll, tokens = nll + model(input_ids=ids, labels=labels).loss.item() * count, tokens + count
    return nll / tokens


def assert_plain_adapter(folder: Path, base: Path, held: Path) -> None:
    """Checks that the folder holds an adapter and nothing of the base.

    Its nll on the evaluation data has to be the logged one.
    """
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    assert not list(folder.glob("*.bin"))
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)
    adapter = adapter_of(folder)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {name.split(".")[-3] for name in adapter} == LAYERS and all(
        "lora_" in name for name in adapter
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert nll_of(model, tokenizer, held) == pytest.approx(
        evaluations(folder)[-1]["eval_nll"], rel=1e-5
    )


def test_one_process_trains_the_adapter_alone_and_writes_what_peft_loads(arguments, tmp_path, root):
    base = root / "data" / "tiny-base"
    settings = {"lora_r": 4, "learning_rate": 0.01, "eval_path": tmp_path / "held.json"}
    (tmp_path / "prompts.txt").write_text("Name a bird.\n")
    train(
        arguments(
            "--lora", sample_prompts=tmp_path / "prompts.txt", sample_max_new_tokens=3, **settings
        )
    )
    out = tmp_path / "out"
    assert_plain_adapter(out, base, tmp_path / "held.json")
    assert {min(tensor.shape) for tensor in adapter_of(out).values()} == {4}
    assert steps(out)[-1]["nll"] < steps(out)[0]["nll"] - 0.1
    written = yaml.safe_load((out / "run.yaml").read_text())
    assert (written["lora"], written["lora_r"], written["lora_alpha"]) == (True, 4, 16)
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "| LoRA | r 4, alpha 16, embeddings frozen |" in card
    with pytest.raises(UserError, match="an adapter, no whole model"):
        check_model(ModelSource(str(out)))
    check_model(ModelSource(str(out)), or_adapter=True)
    assert manifest.problems(out) == []
    ids = torch.arange(20)[None]
    want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)(ids).logits
    # ModelSource is what generate and metrics load.
    torch.testing.assert_close(ModelSource(str(out)).load().eval()(ids).logits, want)


def test_the_objective_inside_peft_is_that_of_the_merged_model(make_model):
    """Also checks the gradients, the guard and detaching.

    Frozen weights get no gradient. The guard against a replaced forward still works.
    """
    for family in ("llama", "gpt2"):
        model = make_model(family)
        handle = attach_objective(model, "emo")
        adapted = add_lora(model, r=3, alpha=6, dropout=0.0)
        for name, parameter in adapted.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_B" in name:  # lora_B is 0 at first
                torch.nn.init.normal_(parameter, std=0.3)
        assert not hasattr(model.get_output_embeddings(), "lora_A")
        ids = torch.randint(3, 97, (2, 9))
        loss = adapted(input_ids=ids, labels=ids, num_items_in_batch=7).loss
        loss.backward()
        assert all(
            (p.grad is not None and p.grad.norm() > 0) == p.requires_grad
            for p in adapted.parameters()
        )
        assert adapted.emo_objective is handle
        assert training_flops(adapted)[0] == pytest.approx(
            4 / 6 * training_flops(make_model(family))[0], rel=0.3
        )
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(ValueError, match="not that of attach_objective"),
        ):
            patch.setattr(model, "forward", lambda **inputs: None)
            adapted(input_ids=ids, labels=ids)
        frozen = make_model(family)  # its costs come from the weights without the adapter
        cost = handle.cost
        handle.detach()
        merged = adapted.merge_and_unload()
        attach_objective(merged, "emo", cost)
        torch.testing.assert_close(
            merged(input_ids=ids, labels=ids, num_items_in_batch=7).loss, loss, rtol=1e-5, atol=1e-6
        )
        assert abs(loss - frozen(input_ids=ids, labels=ids).loss * 16 / 7) > 1e-3


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_two_processes_train_and_write_the_same_adapter(arguments, tmp_path, root, engine):
    settings = {"learning_rate": 0.01, "eval_path": tmp_path / "held.json", "max_steps": 4}
    train(arguments("--lora", output_dir=tmp_path / "one", **settings))
    saves = {"save_strategy": "steps", "save_steps": 2} if engine == "fsdp" else {}
    run_ranks(
        2,
        train,
        arguments("--lora", engine=engine, output_dir=tmp_path / "two", **settings | saves),
    )
    for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert_plain_adapter(tmp_path / "two", root / "data" / "tiny-base", tmp_path / "held.json")
    want = adapter_of(tmp_path / "one")
    assert adapter_of(tmp_path / "two").keys() == want.keys()
    for name, tensor in adapter_of(tmp_path / "two").items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-4)
    if not saves:
        return
    export(tmp_path / "two" / "checkpoint-4", tmp_path / "exported")
    assert all(
        torch.equal(tensor, adapter_of(tmp_path / "exported")[name])
        for name, tensor in adapter_of(tmp_path / "two").items()
    )
    resume = {
        "resume_from_checkpoint": tmp_path / "two" / "checkpoint-2",
        "output_dir": tmp_path / "again",
    }
    run_ranks(2, train, arguments("--lora", engine=engine, **settings | resume))
    for two, again in zip(steps(tmp_path / "two"), steps(tmp_path / "again"), strict=True):
        assert two["loss"] == pytest.approx(again["loss"], abs=1e-5)


def test_one_process_resumes(arguments, tmp_path):
    settings = {"max_steps": 4, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    train(arguments("--lora", **settings))
    resume = {
        "resume_from_checkpoint": tmp_path / "out" / "checkpoint-2",
        "output_dir": tmp_path / "again",
    }
    train(arguments("--lora", **settings | resume))
    one, two = adapter_of(tmp_path / "out"), adapter_of(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_no_token_is_added_for_an_adapter(arguments, tmp_path, root):
    base = root / "data" / "tiny-base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    assert (
        ModelSource(str(tmp_path / "bare")).tokenizer(may_grow=False).pad_token
        == tokenizer.eos_token
    )
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "bare")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(
        UserError, match="--lora trains no embedding, and 2 of the tokenizer's tokens have none"
    ):
        train(arguments("--lora", model_name_or_path=tmp_path / "bare"))


@pytest.mark.parametrize("embeddings", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_trained_output_layer_is_in_the_loss_and_not_in_the_costs(make_model, family, embeddings):
    """The loss and its gradients come from the model's own logits.

    The costs come from the weights before training, without a copy.
    """
    model = make_model(family)
    if family == "gemma3" and embeddings == "lora":  # tied
        with pytest.raises(
            UserError, match="--lora_embeddings lora: the embedding is the output layer"
        ):
            add_lora(model, 3, 6, 0.5, embeddings=embeddings)
        return
    before = model.get_output_embeddings().weight.detach().clone()
    adapted = add_lora(model, r=3, alpha=6, dropout=0.5, embeddings=embeddings)
    handle = attach_objective(model, "emo")
    assert isinstance(handle.cost, CostAlias)
    adapted.eval()  # turns off the hidden layers' dropout; the output layer's adapter has none
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or "modules_to_save" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    ids = torch.randint(3, 97, (2, 9))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    adapted(input_ids=ids, labels=ids).loss.backward()
    got = {name: p.grad for name, p in trained.items()}
    logits = adapted(input_ids=ids).logits[:, :-1]
    want = emo_loss(logits, ids[:, 1:], before)
    for p in trained.values():
        p.grad = None
    want.backward()
    assert len(got) == len(trained) and any("head" in name or "embed" in name for name in got)
    for name, p in trained.items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(adapted(input_ids=ids, labels=ids).loss, want, rtol=1e-5, atol=1e-6)
    assert (
        torch.equal(handle.cost.rows, before)
        and handle.cost.rows.data_ptr() == original_weight(model).data_ptr()
    )
    with adapted.disable_adapter():
        plain = make_model(family)
        attach_objective(plain, "emo")
        torch.testing.assert_close(
            adapted(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss
        )


def test_a_frozen_output_layer_costs_no_gradient_and_no_copy(make_model, monkeypatch):
    """Watches what the loss computes in each chunk.

    With all weights trained there is a product for the output layer's gradient. With LoRA there is
    none.
    """
    products, through = [], chunked._through_head
    monkeypatch.setattr(
        chunked,
        "_through_head",
        lambda g, h, w, rows, out: (products.append(out.d_weight), through(g, h, w, rows, out)),
    )
    ids = torch.randint(3, 97, (2, 9))
    whole, adapted = make_model("llama"), make_model("llama")
    copy = attach_objective(whole, "emo").cost
    assert type(copy) is CostEmbedding and copy.rows.data_ptr() != whole.lm_head.weight.data_ptr()
    peft_model = add_lora(adapted, r=2, alpha=4, dropout=0.0)
    alias = attach_objective(adapted, "emo").cost
    assert alias.rows.data_ptr() == adapted.lm_head.weight.data_ptr()
    losses = []
    for model in (whole, peft_model):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    assert [tensor is None for tensor in products] == [False, True]


@pytest.mark.parametrize(
    ("engine", "family"), [(None, "llama"), ("fsdp", "gemma3"), ("zero3", "llama")]
)
def test_trained_embeddings_and_added_tokens_go_through_files(
    arguments, make_model, tmp_path, root, engine, family
):
    """Trains whole embeddings, with tokens that the base lacks.

    peft and our loader both read exactly what was trained.
    """
    base = tmp_path / "base"
    # gemma3's embedding is tied to its output layer.
    make_model(family, vocab_size=2048, positions=512).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save_pretrained(base)
    argv = arguments(
        "--lora",
        model_name_or_path=base,
        lora_embeddings="full",
        eval_path=tmp_path / "held.json",
        save_strategy="steps",
        save_steps=2,
        max_steps=3,
        **({"engine": engine} if engine else {}),
    )
    run_ranks(2, train, argv) if engine else train(argv)
    out = tmp_path / "out"
    adapter = adapter_of(out)
    ends = [
        adapter[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens")
    ]
    assert [tuple(end.shape) for end in ends] == [(2051, 32)] * 2 and torch.equal(*ends) == (
        family == "gemma3"
    )
    assert all(
        ".default" not in name and "base_layer" not in name and "original" not in name
        for name in adapter
    )
    check_model(ModelSource(str(out)), or_adapter=True)
    model, tokenizer = ModelSource(str(out)).load().eval(), AutoTokenizer.from_pretrained(out)
    assert nll_of(model, tokenizer, tmp_path / "held.json") == pytest.approx(
        evaluations(out)[-1]["eval_nll"], rel=1e-5
    )
    again = [
        *argv,
        "--output_dir",
        str(tmp_path / "again"),
        "--resume_from_checkpoint",
        str(out / "checkpoint-2"),
    ]
    run_ranks(2, train, again) if engine else train(again)
    for name, tensor in adapter_of(tmp_path / "again").items():
        torch.testing.assert_close(tensor, adapter[name], rtol=1e-4, atol=1e-6)


def test_frozen_weights_have_the_precision_that_is_computed_with(arguments, tmp_path):
    for flags, dtype in (
        (["--lora", "--bf16"], torch.bfloat16),
        (["--lora"], torch.float32),
        (["--bf16"], torch.float32),
        (["--lora", "--bf16", "--lora_embeddings", "full"], torch.float32),
    ):
        assert precision(parse(arguments(*flags))) == {"dtype": dtype}
    train(arguments("--lora", "--bf16", max_steps=1))
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "out").values()} == {torch.float32}
    train(arguments("--lora", max_steps=1, output_dir=tmp_path / "exact"))
    assert steps(tmp_path / "out")[0]["loss"] == pytest.approx(
        steps(tmp_path / "exact")[0]["loss"], rel=5e-3
    )


def test_four_bits_are_what_is_trained_beside(make_model, arguments, tmp_path, root):
    pytest.importorskip("bitsandbytes", reason="--qlora needs bitsandbytes, which is not installed")
    base = tmp_path / "base"  # its width is divisible by the block size of bitsandbytes
    make_model(
        "llama", vocab_size=2048, hidden_size=64, intermediate_size=128, initializer_range=0.2
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(base)
    settings = {
        "model_name_or_path": base,
        "eval_path": tmp_path / "held.json",
        "model_max_length": 128,
        "learning_rate": 1e-12,
    }
    train(arguments("--lora", "--qlora", **settings))
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    config.bnb_4bit_compute_dtype = torch.float32
    four, whole = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=c)
        for c in (config, None)
    )
    logged = evaluations(tmp_path / "out")[-1]["eval_nll"]
    exact, rough = (
        nll_of(m, AutoTokenizer.from_pretrained(base), tmp_path / "held.json", 128)
        for m in (whole, four)
    )
    assert logged == pytest.approx(rough, rel=1e-4) and abs(logged - exact) > 1e-3
    adapter = adapter_of(tmp_path / "out")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32} and len(adapter) == 28


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"lora_r": 0}, ["--lora"], "--lora_r 0: give 1 or more"),
        ({"lora_alpha": -1}, ["--lora"], "--lora_alpha -1"),
        ({"lora_dropout": 1}, ["--lora"], "--lora_dropout 1"),
        ({"lora_dropout": "nan"}, ["--lora"], "--lora_dropout nan"),
        ({"lora_target_modules": "q_proj"}, [], "--lora_target_modules needs --lora"),
        ({"lora_target_modules": "q_prj"}, ["--lora"], "no linear layer .* did you mean q_proj"),
        (
            {"lora_target_modules": "lm_head"},
            ["--lora"],
            "lm_head: no linear layer that can have an adapter",
        ),
        ({"lora_target_modules": "embed_tokens"}, ["--lora"], "embed_tokens: no linear layer"),
        ({"lora_embeddings": "some"}, ["--lora"], "invalid choice: 'some'"),
        (
            {"engine": "fsdp"},
            ["--lora", "--qlora"],
            "--fsdp needs a launcher|--qlora: weights in 4 bits are not sharded here",
        ),
        (
            {"mode": "mle"},
            ["--lora", "--from_config"],
            "--lora and --from_config exclude each other",
        ),
    ],
    ids=str,
)
def test_nonsense_is_one_line_and_nothing_is_written(arguments, tmp_path, changes, flags, message):
    with pytest.raises(UserError, match=message) as error:
        train(arguments(*flags, **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
DECODER = SMALL | {
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
KINDS = {
    "Mamba": (
        SMALL | {"state_size": 4},
        "2,400 of 19,776 parameters, beside 6 layers (dt_proj, in_proj, x_proj)",
    ),
    "Mamba2": (
        SMALL | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        "1,408 of 19,808 parameters, beside 2 layers (in_proj)",
    ),
    "FalconH1": (
        DECODER | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
        (
            "4,960 of 34,984 parameters, beside 16 layers (down_proj, gate_proj, in_proj, k_proj, "
            "o_proj, q_proj, up_proj, v_proj)"
        ),
    ),
    "Falcon": (
        SMALL | {"num_attention_heads": 4},
        (
            "3,712 of 27,456 parameters, beside 8 layers (dense, dense_4h_to_h, dense_h_to_4h, "
            "query_key_value)"
        ),
    ),
    "Mixtral": (
        DECODER | {"num_local_experts": 2, "num_experts_per_tok": 1},
        "1,792 of 36,896 parameters, beside 8 layers (k_proj, o_proj, q_proj, v_proj); experts "
        "stay frozen (experts.down_proj, experts.gate_up_proj): --lora_target_parameters reaches "
        "them",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_lora_trains_is_said_whatever_the_model_is_made_of(name):
    config, said = KINDS[name]
    for targets in (None, ["all-linear"]):
        model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**config))
        adapted = add_lora(model, 4, 8, 0.0, targets)
        assert told_adapter(adapted) == f"LoRA trains {said}"
        adapted(input_ids=torch.arange(8)[None]).logits.sum().backward()
        trained = [
            name for name, parameter in adapted.named_parameters() if parameter.requires_grad
        ]
        assert trained and all("lora_" in name for name in trained)


def test_layers_that_peft_cannot_adapt_are_refused_by_name():
    model = AutoModelForCausalLM.from_config(transformers.MambaConfig(**KINDS["Mamba"][0]))
    with pytest.raises(
        UserError, match="--lora_target_modules out_proj: no linear layer that can have an adapter"
    ):
        add_lora(model, 4, 8, 0.0, ["out_proj"])


def test_experts_are_trained_where_they_are_named_and_merged(arguments, root, tmp_path):
    base = tmp_path / "base"
    config = KINDS["Mixtral"][0] | {"vocab_size": 2048, "max_position_embeddings": 512}
    AutoModelForCausalLM.from_config(transformers.MixtralConfig(**config)).save_pretrained(base)
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(base)
    experts = ["--lora_target_parameters", "experts.gate_up_proj", "experts.down_proj"]
    train(
        arguments(
            "--lora",
            *experts,
            model_name_or_path=base,
            output_dir=tmp_path / "adapter",
            max_steps=2,
        )
    )
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert (
        sum(
            ".experts." in name and "lora_B" in name and tensor.abs().max() > 0
            for name, tensor in adapter.items()
        )
        == 4
    )
    merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before if ".experts." in name)
