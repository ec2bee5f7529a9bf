"""Checkpoints whose files hold code, or other weights than the run's, with a matching manifest."""

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from stanford_alpaca.checkpoint import fsdp, manifest
from tests.faults.harness import DDP, FSDP, LORA, PLAIN, ZERO2, Case, Setting, case, check
from tests.faults.state import read_shards
from tests.faults.world import World
from tests.ranks import run_ranks

STEP = 4


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def sign_again(folder: Path) -> None:
    """Writes a manifest that matches the files as they are now."""
    about = {
        name: value
        for name, value in manifest.read(folder).items()
        if name not in ("version", "files", "sum")
    }
    manifest.write(folder, manifest.entries_of(folder, manifest.list_saved(folder)), about)


def own_copy(world: World, setting: Setting, out: Path) -> Path:
    """Copies a run's folder with the checkpoint of step 4 alone, and returns that checkpoint.

    Its files are copies, not hard links.
    """
    usual = world.reference(setting, save_total_limit=None)
    world.copy(usual, out, only=[])
    return Path(shutil.copytree(usual / f"checkpoint-{STEP}", out / f"checkpoint-{STEP}"))


# ---- code ----------------------------------------------------------------------------------------


def in_torch_file(name: str, folder: Path, code: Payload) -> None:
    """Puts the code into a torch file.

    The file keeps its content, except that DeepSpeed's state files then hold the code alone.
    """
    file = next(iter(folder.rglob(name)), folder / name)
    content = torch.load(file, weights_only=False) if file.exists() and "states" not in name else {}
    content["payload"] = code
    torch.save(content, file)
    if name.endswith("model.bin"):  # the weights must be in this file alone
        file.with_suffix(".safetensors" if name.startswith("adapter") else ".none").unlink(
            missing_ok=True
        )
        (folder / "model.safetensors").unlink(missing_ok=True)


def in_metadata(part: str, folder: Path, code: Payload) -> None:
    file = folder / part / ".metadata"
    content = pickle.loads(file.read_bytes())
    content.planner_data = code
    file.write_bytes(pickle.dumps(content))


def in_value(part: str, folder: Path, code: Payload) -> None:
    """Puts the code in place of the first value that is no tensor."""
    entries = fsdp.Reader(folder / part).read_metadata().state_dict_metadata
    state = read_shards(folder / part)
    state[
        next(key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata))
    ] = code
    write_shards(state, folder / part)


def write_shards(state: dict[str, Any], folder: Path) -> None:
    shutil.rmtree(folder)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def look_after(checkpoint: Path, out: Path) -> None:
    """Runs every command that reads a checkpoint. It is called in a separate process."""
    from stanford_alpaca import generate
    from stanford_alpaca.checkpoint import __main__ as command

    look, say = command.main, ["--instruction", "Name a bird.", "--max_new_tokens", 2]
    commands = [
        (look, ["verify", checkpoint]),
        (look, ["list", out]),
        (look, ["export", checkpoint, f"{out}-exported"]),
    ]
    for main, argv in [*commands, (generate.main, [checkpoint, *say])]:
        sys.argv = ["command", *map(str, argv)]
        try:
            main()
        except SystemExit as end:
            assert end.code in (None, 0, 2, 3), f"{argv}: {end.code}"


def payloads(rng: Random) -> list[Case]:
    def never_runs(
        world: World, out: Path, setting: Setting, put: Callable[[Path, Payload], None]
    ) -> None:
        checkpoint, made = own_copy(world, setting, out), out.with_name("made")
        put(checkpoint, Payload(made))
        sign_again(checkpoint)
        check(not manifest.problems(checkpoint), "the manifest does not match")
        named = {"resume": None, "resume_from_checkpoint": checkpoint}
        for changes in ({}, named):
            ended = world.run(setting, out, save_total_limit=None, **changes)
            check(not made.exists(), f"it ran, {changes}\n{ended.text[-2000:]}")
            check(
                set(ended.statuses) <= {2, 3},
                f"{changes}: statuses {ended.statuses}\n{ended.text[-2000:]}",
            )
            check("Traceback" not in ended.text, ended.text[-2000:])
        run_ranks(1, look_after, checkpoint, out, launched=False)
        check(not made.exists(), "it ran in verify, list, export or generate")

    places: list[tuple[Setting, str, Callable]] = [
        *(
            (PLAIN, name, in_torch_file)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        ),
        *((PLAIN, name, in_torch_file) for name in ("training_args.bin", "pytorch_model.bin")),
        (LORA, "adapter_model.bin", in_torch_file),
        (DDP, "rng_state_1.pth", in_torch_file),
        *((FSDP, part, in_metadata) for part in (fsdp.MODEL, fsdp.OPTIMIZER)),
        (FSDP, fsdp.OPTIMIZER, in_value),
        *(
            (ZERO2, name, in_torch_file)
            for name in ("mp_rank_00_model_states.pt", "*zero_pp_rank_1_mp_rank_00_optim_states.pt")
        ),
    ]
    return [
        case(
            f"{setting.name}, {name}, {put.__name__.replace('_', ' ')}",
            never_runs,
            setting,
            partial(put, name),
        )
        for setting, name, put in places
    ]


# ---- other weights -------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]


def other_dtype(weights: Weights, key: str) -> None:
    weights[key] = weights[key].half()


def other_shape(weights: Weights, key: str) -> None:
    weights[key] = weights[key][:, 1:].clone()


def without_key(weights: Weights, key: str) -> None:
    del weights[key]


def other_vocabulary(weights: Weights, key: str) -> None:
    for name in [
        name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    ]:
        weights[name] = torch.cat([weights[name], weights[name][:1]])


def change_weights(checkpoint: Path, change: Callable[[Weights, str], None], part: str) -> None:
    """Changes the weight whose name contains ``part``, in the file that the engine wrote."""
    if (checkpoint / fsdp.MODEL).is_dir():
        weights = read_shards(checkpoint / fsdp.MODEL)
        change(weights, next(name for name in weights if part in name))
        return write_shards(weights, checkpoint / fsdp.MODEL)
    file = next(checkpoint.glob("*model.safetensors"))
    weights = load_file(file)
    change(weights, next(name for name in weights if part in name))
    save_file(weights, file, {"format": "pt"})


def wrong_weights(rng: Random) -> list[Case]:
    def refused(world: World, out: Path, setting: Setting, change: Callable, word: str) -> None:
        checkpoint = own_copy(world, setting, out)
        change_weights(checkpoint, change, word)
        sign_again(checkpoint)
        is_refused(world, out, setting, "2049" if change is other_vocabulary else word)

    def other_base(world: World, out: Path, setting: Setting, base: str) -> None:
        own_copy(world, setting, out)
        is_refused(world, out, setting, "model", model_name_or_path=world.folder / base)

    def is_refused(world: World, out: Path, setting: Setting, word: str, **changes: Any) -> None:
        before = manifest.entries_of(out, manifest.list_saved(out))
        ended = world.run(setting, out, save_total_limit=None, **changes)
        check(set(ended.statuses) <= {2, 3}, f"statuses {ended.statuses}\n{ended.text[-2000:]}")
        check("Traceback" not in ended.text and len(set(ended.errors())) == 1, ended.text[-2000:])
        check(word in ended.errors()[0], f"{word} is not named: {ended.errors()}")
        check(
            manifest.entries_of(out, manifest.list_saved(out)) == before,
            "the output folder has changed",
        )

    cases = []
    for setting, part in (
        (PLAIN, "layers.1.mlp.up_proj.weight"),
        (LORA, "layers.1.mlp.up_proj.lora_A"),
        (FSDP, "layers.1.mlp.up_proj"),
    ):
        for change in (other_dtype, other_shape, without_key):
            cases.append(
                case(
                    f"{setting.name}, {change.__name__.replace('_', ' ')}",
                    refused,
                    setting,
                    change,
                    part,
                )
            )
        if setting is LORA:  # an adapter has no embedding
            cases.append(
                case("lora, a base of another vocabulary", other_base, setting, "wide-base")
            )
        else:
            cases.append(
                case(f"{setting.name}, other vocabulary", refused, setting, other_vocabulary, part)
            )
        cases.append(case(f"{setting.name}, another base", other_base, setting, "other-base"))
    return cases


ROWS = {"pickled code": payloads, "wrong weights": wrong_weights}
