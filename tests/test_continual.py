"""Tests continual fine-tuning on text: the published recipe, run by the training command.

Two processes and a resumed run take the same steps as one process.
"""

import subprocess

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.continual import chosen_recipe, recipe
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.losses import emo_loss
from stanford_alpaca.train import train
from tests.helpers import evaluations, steps
from tests.ranks import run_ranks

LINES = [
    f"The king of land {i} is old, and his river runs to the sea of the {i % 7} winds."
    for i in range(60)
]


@pytest.fixture
def argv(root, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(LINES[:40]) + "\n\n" + "\n".join(LINES[40:]))
    fixed = {
        "model_name_or_path": root / "data" / "tiny-base",
        "data_path": tmp_path / "text.txt",
        "cache_dir": tmp_path / "cache",
        "block_size": 32,
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "global_batch": 8,
    }

    def make(**changes) -> list[str]:
        return [
            text for name, value in (fixed | changes).items() for text in (f"--{name}", str(value))
        ]

    return make


def test_the_recipe_fills_in_what_is_not_given_and_the_first_loss_is_emo2_of_the_text(
    argv, tmp_path, root
):
    train(argv(output_dir=tmp_path / "out", documents="blank", max_sentences=50), recipe([], 1))
    written = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    wanted = {
        "mode": "emo2",
        "lora": True,
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "learning_rate": 2e-5,
        "num_train_epochs": 1.0,
        "block_size": 32,
        "save_total_limit": 1,
        "max_sentences": 50,
    }
    assert {name: written[name] for name in wanted} == wanted
    assert recipe([], 1)["max_sentences"] == 25_000
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_blocks_are_what_is_trained_and_evaluated(argv, tmp_path, root):
    """Trains all weights with a negligible learning rate, four blocks a step.

    Each step's loss is that of its text, and no text is seen twice.
    """
    changes = {
        "lora": False,
        "per_device_train_batch_size": 4,
        "global_batch": 4,
        "learning_rate": 1e-12,
        "max_steps": -1,
        "eval_fraction": 0.1,
    }
    train(
        argv(output_dir=tmp_path / "out", train_sampling_strategy="sequential", **changes),
        recipe([], 1),
    )
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tiny-base")
    model = AutoModelForCausalLM.from_pretrained(root / "data" / "tiny-base", dtype=torch.float32)
    text = load_records(str(tmp_path / "text.txt"), str(tmp_path / "cache"))[0]["text"]
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    blocks = list(ids.unfold(0, 32, 31)) + [ids[(len(ids) - 1) // 31 * 31 :]] * (
        (len(ids) - 1) % 31 > 0
    )
    held = round(0.1 * len(blocks) + 0.499)
    cost = model.get_output_embeddings().weight.detach()

    def loss_of(part: list[torch.Tensor]) -> float:
        rows = [
            emo_loss(
                model(block[None]).logits[0, :-1], block[1:], cost, mode="emo2", reduction="none"
            )
            for block in part
        ]
        return torch.cat(rows).mean().item()

    logged = steps(tmp_path / "out")
    assert len(logged) == -(-(len(blocks) - held) // 4)
    for number, step in enumerate(logged):
        assert step["loss"] == pytest.approx(
            loss_of(blocks[:-held][4 * number : 4 * number + 4]), rel=1e-4
        )
    assert evaluations(tmp_path / "out")[-1]["eval_loss"] == pytest.approx(
        loss_of(blocks[-held:]), rel=1e-4
    )


def test_two_processes_and_a_resumed_run_take_the_same_steps(argv, tmp_path):
    changes = {
        "lora_dropout": 0,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 5,
        "learning_rate": 1e-3,
    }
    train(argv(output_dir=tmp_path / "one", **changes), recipe([], 1))
    changes |= {"per_device_train_batch_size": 4, "engine": "fsdp"}
    run_ranks(2, train, argv(output_dir=tmp_path / "two", **changes), recipe([], 2))
    changes |= {"resume_from_checkpoint": tmp_path / "two" / "checkpoint-2"}
    run_ranks(2, train, argv(output_dir=tmp_path / "again", **changes), recipe([], 2))
    for runs in zip(*(steps(tmp_path / name) for name in ("one", "two", "again")), strict=True):
        assert [entry["loss"] for entry in runs] == pytest.approx([runs[0]["loss"]] * 3, abs=1e-5)
        assert [entry["grad_norm"] for entry in runs] == pytest.approx(
            [runs[0]["grad_norm"]] * 3, rel=1e-4
        )


@pytest.mark.parametrize(
    ("argv", "world_size", "want"),
    [
        ([], 1, (16, 16)),
        ([], 4, (4, 16)),
        ([], 3, (5, 15)),
        ([], 20, (1, 20)),
        (["--per_device_train_batch_size", "4"], 2, (8, 16)),
        (["--per-device-train-batch-size=6"], 1, (16, 12)),
        (["--gradient_accumulation_steps", "2"], 2, (8, None)),
    ],
)
def test_sixteen_blocks_make_a_step(argv, world_size, want, capsys):
    found = recipe(argv, world_size)
    assert (found["per_device_train_batch_size"], found.get("global_batch")) == want
    assert ("cannot be had" in capsys.readouterr().out) == (want[1] in (15, 20, 12))


def test_the_scripts_recipe_adds_what_the_paper_does_not_say(root):
    name, rest = chosen_recipe(["--model_name_or_path", "m", "--recipe", "script", "--seed", "3"])
    assert name == "script" and rest == ["--model_name_or_path", "m", "--seed", "3"]
    found, paper = recipe(rest, 1, name), recipe(rest, 1)
    assert {key: value for key, value in found.items() if value != paper.get(key)} == {
        "max_sentences": 0,
        "lora_target_modules": ["q_proj", "v_proj"],
        "seed": 100,
    }
    assert "lora_target_modules" not in recipe(["--lora", "False"], 1, "script")
    assert chosen_recipe(["--lora"]) == ("paper", ["--lora"])
    with pytest.raises(UserError, match=r"--recipe papr: choose from paper, script; did you mean"):
        chosen_recipe(["--recipe=papr"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, "--block_size 1: give 2 or more"),
        ({"block_size": 2000}, "--block_size 2000 is more than the model's 1024 positions"),
        ({"max_sentences": -1}, "--max_sentences -1: give 1 or more, or 0 for all"),
        ({"packing": True}, "--block_size and --packing exclude each other"),
        ({"streaming": True}, "--block_size and --streaming exclude each other"),
        ({"data_path": "no.txt"}, "no.txt: no such file"),
        ({"data_path": "data/instructions/train.json"}, "--block_size cuts running text"),
        ({"eval_fraction": 0.001}, "leaves one side empty"),
        ({"lora_target_modules": "q_proj", "lora": False}, "--lora_target_modules needs --lora"),
    ],
    ids=str,
)
def test_nonsense_is_one_line_and_nothing_is_written(argv, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(argv(output_dir=tmp_path / "out", **changes), recipe([], 1))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--mode", "emo"]])
def test_the_launcher_wants_a_model_first(root, words):
    """The README's commands show what the launcher does with a model."""
    done = subprocess.run(
        ["bash", str(root / "finetune.sh"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: give MODEL_PATH first, a folder or a hub name: bash finetune.sh MODEL_PATH "
        "[OUTPUT] [flags]\n"
    )
