"""Tests checkpoints.

Checks what every engine writes, which engine can resume from it, and export. Reading a checkpoint
runs no code from it.
"""

import os
import pickle
import re
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stanford_alpaca.checkpoint import __main__ as command
from stanford_alpaca.checkpoint import fsdp, zero
from stanford_alpaca.checkpoint.export import export
from stanford_alpaca.checkpoint.kinds import FSDP, PLAIN, ZERO, check_resumable
from stanford_alpaca.checkpoint.pickles import refuse_code, restrict_deepspeed
from stanford_alpaca.errors import UserError
from stanford_alpaca.train import train
from tests.helpers import BEST_OF_EACH_STEP, evaluations, steps
from tests.ranks import run_ranks, start_gloo


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def write_shards(model, folder: Path) -> Path:
    """Writes what FSDP2 saves of a model, from one process."""
    state = {"model": model.state_dict()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / fsdp.MODEL), no_dist=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return folder


def same_tensors(one: Path, two: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# untied, tied, and stored in another shape than it computes with
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_export_makes_of_shards_what_save_pretrained_makes(make_model, tmp_path, family):
    model = make_model(family)
    shards = write_shards(model, tmp_path / "checkpoint-1")
    assert "all keys are there" in export(shards, tmp_path / "out")
    model.save_pretrained(tmp_path / "plain")
    assert same_tensors(tmp_path / "plain", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_shards_that_python_3_13_wrote_are_read(make_model, tmp_path):
    metadata = (
        write_shards(make_model("llama"), tmp_path / "checkpoint-1") / fsdp.MODEL / ".metadata"
    )
    content = pickle.dumps(pickle.loads(metadata.read_bytes()), protocol=2)
    there = content.replace(b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n")
    assert b"pathlib._local" in there
    metadata.write_bytes(there)
    assert "all keys are there" in export(tmp_path / "checkpoint-1", tmp_path / "out")


def test_nothing_in_fsdp_shards_is_run(make_model, tmp_path):
    model, made = make_model("llama"), tmp_path / "made"
    metadata = write_shards(model, tmp_path / "checkpoint-1") / fsdp.MODEL / ".metadata"
    good = metadata.read_bytes()
    content = pickle.loads(good)
    content.planner_data = Payload(made)
    metadata.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"posix\.mkdir does not belong into a checkpoint"):
        export(tmp_path / "checkpoint-1", tmp_path / "out")
    content = pickle.loads(good)
    next(iter(content.storage_data.values())).relative_path = "../elsewhere"
    metadata.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="outside the checkpoint"):
        export(tmp_path / "checkpoint-1", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    optimizer = torch.optim.AdamW(model.parameters())
    state = {"optimizer": fsdp.get_optimizer_state_dict(model, optimizer)}
    state["optimizer"]["param_groups"][0]["lr"] = Payload(made)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / fsdp.OPTIMIZER), no_dist=True)
    with pytest.raises(UserError, match=r"param_groups.*holds more than numbers"):
        fsdp.load_optimizer(model, optimizer, tmp_path)
    assert not made.exists()


def test_nothing_in_zero_shards_is_run(tmp_path):
    folder = tmp_path / "global_step1"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step1")
    torch.save({"module": Payload(tmp_path / "made")}, folder / "mp_rank_00_model_states.pt")
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    # restricts DeepSpeed's own reader, which resuming and loading the best checkpoint use
    restrict_deepspeed()
    engine = torch_checkpoint_engine.TorchCheckpointEngine()
    for read in (
        zero.read_weights,
        refuse_code,
        lambda place: engine.load(folder / "mp_rank_00_model_states.pt"),
    ):
        with pytest.raises(
            UserError, match=r"mp_rank_00_model_states\.pt: holds more than a checkpoint does"
        ):
            read(tmp_path)
    assert not (tmp_path / "made").exists()
    for name in ("..", ".", "../global_step1"):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(UserError, match="does not name a folder beside it"):
            zero.read_weights(tmp_path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: shutil.rmtree(folder / fsdp.MODEL), "no weights of a checkpoint"),
        (lambda folder: next((folder / fsdp.MODEL).glob("*.distcp")).unlink(), "distcp'"),
        (
            lambda folder: (folder / fsdp.MODEL / ".metadata").write_bytes(b"broken"),
            "cannot be read",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no configuration to read"),
        (
            lambda folder: change_config(
                folder, '"num_hidden_layers": 2', '"num_hidden_layers": 3'
            ),
            "lacks .*layers.2",
        ),
        (
            lambda folder: change_config(
                folder, '"num_hidden_layers": 2', '"num_hidden_layers": 1'
            ),
            "has .*layers.1",
        ),
        (
            lambda folder: change_config(folder, '"vocab_size": 97', '"vocab_size": 99'),
            r"embed_tokens.weight is \[97",
        ),
        (lambda folder: (folder.parent / "out").write_text("precious"), "is not an empty folder"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    make_model, tmp_path, monkeypatch, capsys, harm, message
):
    harm(write_shards(make_model("llama"), tmp_path / "checkpoint-1"))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(
        sys, "argv", ["checkpoint", "export", str(tmp_path / "checkpoint-1"), str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == (3 if "distcp" in message else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert sorted(tmp_path.iterdir()) == before


def change_config(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def test_who_can_go_on_from_what(make_model, tmp_path):
    shards = write_shards(make_model("llama"), tmp_path / "fsdp")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"has no optimizer.pt .* nobody can go on from it"):
        check_resumable(tmp_path / "plain", PLAIN, world_size=1)
    (tmp_path / "plain" / "optimizer.pt").touch()
    with pytest.raises(UserError, match=r"has no scheduler.pt .* nobody can go on from it"):
        check_resumable(tmp_path / "plain", PLAIN, world_size=1)
    for folder in (tmp_path / "plain", shards):
        (folder / "scheduler.pt").touch()
    (shards / fsdp.OPTIMIZER).mkdir()
    (tmp_path / "zero" / "step").mkdir(parents=True)
    (tmp_path / "zero" / "latest").write_text("step")
    for rank in range(12):
        (
            tmp_path / "zero" / "step" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        ).touch()
    assert [file.name.split("_")[4] for file in zero.shards_of(tmp_path / "zero")] == [
        str(rank) for rank in range(12)
    ]
    for engine, checkpoint in [(FSDP, shards), (PLAIN, shards), (PLAIN, tmp_path / "plain")]:
        check_resumable(checkpoint, engine, world_size=3)
    for engine, checkpoint, message in [
        (ZERO, shards, "FSDP wrote it, ZeRO cannot go on"),
        (FSDP, tmp_path / "plain", "a run without shards wrote it, FSDP cannot go on"),
        (PLAIN, tmp_path / "zero", "ZeRO wrote it, a run without shards cannot go on"),
        (ZERO, tmp_path / "zero", "as many processes as wrote it, 12, not 3"),
    ]:
        with pytest.raises(
            UserError,
            match=f"{message}; python -m stanford_alpaca.checkpoint export {checkpoint} OUT",
        ):
            check_resumable(checkpoint, engine, world_size=3)
    with pytest.raises(UserError, match="another stage"):
        check_resumable(tmp_path / "zero", ZERO, world_size=12, stage_3=False)


def gather_tied() -> tuple[int, bool, list[str]]:
    """Gathers a sharded model with tied weights.

    Returns the most whole parameters alive at once, not counting those that rank 0 keeps, whether
    all values are right, and the names.
    """
    from torch.distributed.fsdp import fully_shard

    from stanford_alpaca.checkpoint import gather
    from tests.conftest import tiny_model

    start_gloo()
    model = tiny_model("gpt2")
    want = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in (*model.transformer.h, model):
        fully_shard(layer)
    alive: weakref.WeakSet = weakref.WeakSet()
    whole, most = gather._whole, 0

    def counted(value, parameter):
        nonlocal most
        gathered = whole(value, parameter)
        alive.add(gathered)
        most = max(most, len(alive))
        return gathered

    gather._whole = counted
    state = gather.full_state_dict(model, keep=torch.distributed.get_rank() == 0)
    return most, all(torch.equal(want[name], value) for name, value in state.items()), list(state)


def test_gathering_holds_one_whole_parameter_at_a_time(make_model):
    (most, equal, names), (most_of_other, _, kept_by_other) = run_ranks(2, gather_tied)
    assert (most, most_of_other) == (1, 1)
    assert equal and names == list(make_model("gpt2").state_dict()) and kept_by_other == []


def odd_model(make_model, root, folder: Path) -> Path:
    """Saves a model with tied weights, with sizes that two ranks cannot halve."""
    shape = {"vocab_size": 2049, "positions": 512, "n_embd": 33, "n_head": 3}
    make_model("gpt2", **shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(root / "data" / "tiny-base").save_pretrained(folder)
    return folder


def test_four_ranks_of_fsdp_go_on_as_two_as_one_and_without_fsdp(
    arguments, make_model, root, tmp_path
):
    settings = {
        "model_name_or_path": odd_model(make_model, root, tmp_path / "odd"),
        "per_device_train_batch_size": 2,
    }
    # an epoch has three steps
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run_ranks(4, train, arguments("--fsdp", **settings))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not list(checkpoint.glob("*.safetensors"))  # no whole model was gathered during training
    assert len(list((checkpoint / fsdp.MODEL).glob("*.distcp"))) == 4
    settings |= {"save_strategy": "no", "resume_from_checkpoint": checkpoint}
    for ranks in (2, 1):
        run_ranks(ranks, train, arguments("--fsdp", output_dir=tmp_path / str(ranks), **settings))
    train(arguments(output_dir=tmp_path / "plain", **settings))
    for name in ("2", "1", "plain"):
        for whole, resumed in zip(steps(tmp_path / "out"), steps(tmp_path / name), strict=True):
            assert resumed["loss"] == pytest.approx(whole["loss"], abs=1e-5), name
            assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
            assert resumed["learning_rate"] == whole["learning_rate"]
        weights = load_file(tmp_path / name / "model.safetensors")
        for key, weight in load_file(tmp_path / "out" / "model.safetensors").items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-5)


def test_the_best_of_sharded_checkpoints_is_kept_and_saved(arguments, make_model, root, tmp_path):
    model = odd_model(make_model, root, tmp_path / "odd")
    settings = {
        **BEST_OF_EACH_STEP,
        "eval_path": tmp_path / "held.json",
        "learning_rate": 0.3,
        "save_total_limit": 1,
    }
    run_ranks(
        2,
        train,
        arguments("--fsdp", model_name_or_path=model, lr_scheduler_type="constant", **settings),
    )
    losses = [entry["eval_loss"] for entry in evaluations(tmp_path / "out")]
    best = losses.index(min(losses)) + 1
    assert best != 3 and [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == [
        f"checkpoint-{best}"
    ]
    export(tmp_path / "out" / f"checkpoint-{best}", tmp_path / "exported")
    assert same_tensors(tmp_path / "out", tmp_path / "exported")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_export_of_zero_equals_the_model_saved_at_the_same_step(
    arguments, make_model, root, tmp_path, stage
):
    flags = ["--deepspeed", str(root / "ds_configs" / f"{stage}.json")]
    model = odd_model(make_model, root, tmp_path / "odd")
    run_ranks(
        2, train, arguments(*flags, model_name_or_path=model, max_steps=1, save_strategy="steps")
    )
    checkpoint = tmp_path / "out" / "checkpoint-1"
    export(checkpoint, tmp_path / "exported")
    assert same_tensors(tmp_path / "out", tmp_path / "exported")
    refuse_code(checkpoint)  # it holds what DeepSpeed writes and nothing else
    zero.shards_of(checkpoint)[1].unlink()
    with pytest.raises(UserError, match="1 of 2 optimizer shards are there"):
        zero.read_weights(checkpoint)
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "exported" / name).read_text()
