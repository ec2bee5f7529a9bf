"""Staging: a checkpoint appears whole or not at all, and disk errors are reported in words.

An old checkpoint stays until the new one is there.
"""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stanford_alpaca.checkpoint import manifest, saving
from stanford_alpaca.checkpoint.saving import Staged, keep_newest, recover, write_together
from stanford_alpaca.errors import UserError
from stanford_alpaca.train import train
from tests.ranks import run_ranks, start_gloo


def save(target, text="new"):
    staged = Staged(target, 0, 1)
    staged.write(lambda: (staged.folder / "a.txt").write_text(text))
    staged.commit({"step": manifest.step_of(target)})
    return target


def test_a_folder_appears_when_it_is_whole_and_replaces_what_was_there(tmp_path):
    target = tmp_path / "checkpoint-2"
    (tmp_path / ".deleting-checkpoint-1").mkdir()
    (tmp_path / ".saving" / "checkpoint-1").mkdir(parents=True)  # left by a killed run
    staged = Staged(target, 0, 1)
    staged.write(lambda: (staged.folder / "a.txt").write_text("old"))
    assert not target.exists()
    staged.commit({"step": 2})
    assert manifest.problems(target) == [] and os.listdir(tmp_path) == ["checkpoint-2"]
    save(target)
    assert (target / "a.txt").read_text() == "new" and os.listdir(tmp_path) == ["checkpoint-2"]


# The run is killed after the old folder has been removed, or before.
@pytest.mark.parametrize("name", ["remove", "flush_folders"])
def test_a_checkpoint_that_is_replaced_is_there_whenever_the_run_is_killed(
    tmp_path, monkeypatch, name
):
    target, module = (
        save(tmp_path / "checkpoint-2", "old"),
        saving if name == "remove" else manifest,
    )
    act = getattr(module, name)

    def killed(folder):
        if name == "remove":
            act(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        save(target)
    recover(tmp_path)
    assert manifest.problems(target) == [] and (target / "a.txt").read_text() == (
        "new" if name == "remove" else "old"
    )


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (full, "No space left on device"),
        (lambda: save_file({"a": torch.ones(1)}, "/proc/a.safetensors"), "os error"),
        (lambda: torch.save(torch.ones(1), "/proc/a.pt"), ""),
        (lambda: torch.save(torch.ones(1000), "/dev/full"), "torch.save could not write"),
    ],
)
def test_what_the_disk_refuses_is_one_line_and_leaves_what_was_saved(tmp_path, write, reason):
    good = save(tmp_path / "checkpoint-1")
    staged = Staged(tmp_path / "checkpoint-2", 0, 1)
    with pytest.raises(
        UserError,
        match=rf"checkpoint-2: cannot be saved \(.*{reason}.*"
        r"nothing that was saved before has changed",
    ):
        staged.write(write)
    assert manifest.problems(good) == [] and not (tmp_path / "checkpoint-2").exists()


def test_room_is_looked_for_before_the_first_byte(tmp_path):
    good = save(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-2 needs 1,048,576,000 MiB, and .* are free"):
        Staged(tmp_path / "checkpoint-2", 0, 1, needed=10**9 * 2**20 + 48_576_000 * 2**20)
    assert manifest.problems(good) == [] and os.listdir(tmp_path) == ["checkpoint-1"]


def test_our_own_mistakes_are_not_called_the_disks(tmp_path):
    with pytest.raises(KeyError):
        Staged(tmp_path / "checkpoint-2", 0, 1).write(lambda: {}["a"])
    with pytest.raises(FileNotFoundError):
        write_together(tmp_path, 1, (tmp_path / "none" / "a.txt").touch)


def test_room_helps_against_a_full_disk_only(tmp_path):
    (tmp_path / "a").touch()
    for write, advised in ((full, True), ((tmp_path / "a" / "b").touch, False)):
        with pytest.raises(UserError, match="cannot be saved") as error:
            write_together(tmp_path, 1, write)
        assert ("make room" in str(error.value)) == advised


def save_as_one_of_two(target):
    start_gloo()
    rank = torch.distributed.get_rank()
    staged = Staged(target, rank, 2)
    staged.write(lambda: (staged.folder / f"rank{rank}.txt").write_text("x"))
    staged.commit({"step": 1})
    staged = Staged(target.with_name("checkpoint-2"), rank, 2)
    try:
        staged.write(full if rank == 1 else lambda: None)
    except UserError as error:
        return str(error)


def test_all_ranks_write_and_all_hear_of_the_one_that_could_not(tmp_path):
    messages = run_ranks(2, save_as_one_of_two, tmp_path / "checkpoint-1")
    assert list(manifest.read(tmp_path / "checkpoint-1")["files"]) == ["rank0.txt", "rank1.txt"]
    assert messages[0] == messages[1] and "No space left on device on rank 1" in messages[0]


@pytest.mark.parametrize(
    ("limit", "best", "broken", "saved", "kept"),
    [
        (None, None, [], 4, [1, 2, 3, 4]),
        (2, None, [], 4, [3, 4]),
        (1, None, [], 4, [4]),
        (1, 2, [], 4, [2, 4]),
        (2, 1, [], 4, [1, 4]),
        (2, 4, [], 4, [3, 4]),
        (2, None, [3], 4, [2, 4]),  # a damaged checkpoint does not count towards the limit
        (1, None, [], 3, [3, 4]),  # a newer checkpoint that the run did not resume from is kept
        (2, None, [4], 3, [2, 3, 4]),
    ],
)
def test_the_limit_never_deletes_the_one_just_saved(tmp_path, limit, best, broken, saved, kept):
    for step in (1, 2, 3, 4):
        save(tmp_path / f"checkpoint-{step}")
        if step in broken:
            (tmp_path / f"checkpoint-{step}" / "a.txt").unlink()
    keep_newest(
        tmp_path / f"checkpoint-{saved}", limit, best and str(tmp_path / f"checkpoint-{best}")
    )
    assert sorted(map(manifest.step_of, manifest.checkpoints(tmp_path))) == kept


def test_finished_files_are_merged_and_the_old_manifest_goes_first(tmp_path):
    (tmp_path / manifest.MANIFEST_FILE).write_text("old")
    (tmp_path / "run.yaml").write_text("kept")
    staged = Staged(tmp_path / "model", 0, 1)
    (staged.folder / "templates").mkdir()
    staged.write(lambda: (staged.folder / "a.txt").write_text("x"))
    staged.write(lambda: (staged.folder / "templates" / "b.txt").write_text("x"))
    files = staged.merge()
    assert list(files) == ["a.txt", "templates/b.txt"]
    assert (
        sorted(os.listdir(tmp_path)) == ["a.txt", "run.yaml", "templates"]
        and (tmp_path / "templates" / "b.txt").exists()
    )


def test_an_old_checkpoint_that_cannot_be_deleted_is_said(tmp_path, monkeypatch, capsys):
    save(tmp_path / "checkpoint-1"), save(tmp_path / "checkpoint-2")
    monkeypatch.setattr(Path, "replace", full)
    keep_newest(tmp_path / "checkpoint-2", 1, None)
    assert (
        "an old checkpoint cannot be deleted ([Errno 28] No space left on device)"
        in capsys.readouterr().out
    )


def train_on_a_full_disk(argv, ranks_and_names):
    """Returns the error of a run that cannot create these files or folders.

    Each pair is the rank on which the name is refused, and the name.
    """

    def refuse(event, args):
        saving = (
            event in ("open", "os.mkdir")
            and torch.distributed.is_initialized()
            and f"{os.sep}out{os.sep}" in str(args[0])
        )
        if saving and (torch.distributed.get_rank(), Path(str(args[0])).name) in ranks_and_names:
            # Not an OSError: mkdir ignores one if another rank has made the folder.
            raise RuntimeError("No space left on device")

    sys.addaudithook(refuse)
    try:
        train(argv)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("engine", "refused"),
    [
        ("fsdp", [(1, "optimizer_0")]),
        ("zero2", [(0, "latest"), (0, "zero_to_fp32.py")]),
        ("ddp", [(0, "README.md")]),
    ],
)
def test_no_rank_waits_for_one_whose_disk_is_full(arguments, monkeypatch, engine, refused):
    monkeypatch.setattr("tests.ranks.TIMEOUT", 240.0)
    argv = arguments("--engine", engine, max_steps=1, save_strategy="steps", mode="mle")
    one, other = run_ranks(2, train_on_a_full_disk, argv, refused)
    assert one == other and f"No space left on device on rank {refused[0][0]}" in one


@pytest.mark.parametrize(
    "name", ["train.write_run", "training.callbacks.append_jsonl", "train.manifest.write"]
)
def test_a_full_disk_is_a_line_also_beside_checkpoints(arguments, monkeypatch, tmp_path, name):
    monkeypatch.setattr(f"stanford_alpaca.{name}", full)
    (tmp_path / "prompts.json").write_text('[{"instruction": "Say hello."}]')
    sampled = {"sample_prompts": tmp_path / "prompts.json", "sample_max_new_tokens": 1}
    with pytest.raises(
        UserError, match=r"out.*: cannot be saved \(.*No space left on device\).*make room"
    ):
        train(arguments(max_steps=1, mode="mle", **sampled))
