"""Files of commands: whole or absent, on a full disk too, and never over another file."""

import ast
import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from stanford_alpaca.checkpoint.files import append_lines, check_new, new_file, write_new
from stanford_alpaca.checkpoint.manifest import write_whole
from stanford_alpaca.cost.build import save
from stanford_alpaca.data.fetch import write_json
from stanford_alpaca.errors import UserError
from stanford_alpaca.generation.writers import write_alpaca_eval, write_jsonl, write_markdown

LONG = "x" * 2**17  # more than the disk of the tests holds
SAMPLE = {"instruction": LONG, "input": "", "reference": "", "responses": {"model": "b"}}


def draw(file: Path) -> None:
    figure = Figure(figsize=(20, 20))
    figure.add_subplot().imshow(np.random.default_rng(0).random((200, 200)))
    with new_file(file) as part:
        figure.savefig(part, dpi=200)


WRITERS = {
    "generate --out": ("a.jsonl", lambda file: write_jsonl(file, [SAMPLE])),
    "generate --alpaca_eval": ("a.json", lambda file: write_alpaca_eval(file, [SAMPLE])),
    "generate --markdown": ("a.md", lambda file: write_markdown(file, [SAMPLE], {})),
    "report --out": ("a.html", lambda file: write_new(file, LONG)),
    "cost build --out": ("a.safetensors", lambda file: save(np.ones((300, 300), np.float32), file)),
    "cost describe --plot": ("a.png", draw),
    "fetch --out": ("a.json", lambda file: write_json(file, [{"output": LONG}])),
}


@pytest.fixture
def small_disk(tmp_path):
    """A folder of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk can only be mounted by root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_nothing_is_left(small_disk, tmp_path, writer):
    name, write = WRITERS[writer]
    with pytest.raises(UserError, match=rf"{name}: cannot be written \(.*No space left"):
        write(small_disk / "new" / name)
    assert list((small_disk / "new").iterdir()) == []
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 2**16


def test_what_is_appended_to_a_full_disk_is_whole_or_absent(small_disk):
    file = small_disk / "samples.jsonl"
    append_lines(file, '{"step": 1}\n')
    with pytest.raises(OSError, match="No space left"):
        append_lines(file, json.dumps(LONG) + "\n")
    append_lines(file, '{"step": 2}\n')
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_record_on_a_full_disk_stays_as_it_was(small_disk):
    write_whole(small_disk / "run.yaml", "old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(small_disk / "run.yaml", LONG)
    assert [file.name for file in small_disk.iterdir()] == ["run.yaml"]
    assert (small_disk / "run.yaml").read_text() == "old"


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_appears_meanwhile_is_left_as_it_is(tmp_path, monkeypatch, writer, linked):
    name, write = WRITERS[writer]

    def no_link(*args: object) -> None:
        raise OSError(errno.EPERM, "no links")

    if not linked:
        monkeypatch.setattr(os, "link", no_link)
    write(tmp_path / "free" / name)
    assert [file.name for file in (tmp_path / "free").iterdir()] == [name]
    (tmp_path / name).write_text("somebody else's")
    with pytest.raises(UserError, match="appeared while this command ran, and is left"):
        write(tmp_path / name)
    assert (tmp_path / name).read_text() == "somebody else's"
    assert {file.name for file in tmp_path.iterdir()} == {"free", name}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("there.txt", "does not exist yet"),
        ("dangling", "does not exist yet"),
        ("", "does not exist yet"),
        ("True", "does not exist yet"),
        ("x" * 256, "File name too long"),
        ("new/" + "é" * 128, "File name too long"),
        ("there.txt/below", "is a file"),
        ("a\0b", "null"),
    ],
)
def test_names_that_no_file_can_have_are_refused(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    Path("there.txt").touch()
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=said):
        check_new("out", name)
    assert check_new("out", "y" * 255) == Path("y" * 255)


# where a file is written in another way, and why that is whole, too
OTHERWISE = {
    "bench/trials.py": "the log of the runs that it starts",
    "checkpoint/files.py": "is the writer",
    "checkpoint/manifest.py": "beside the file, then moved",
    "cost/build.py": "in new_file",
    "cost/description.py": "in new_file",
    "data/fetch.py": "in new_file",
    "evaluation/metrics.py": "in new_file",
    "run/model_card.py": "in a staged folder",
    "training/progress.py": "lines are taken out of a log that is otherwise only appended to",
    "training/resumable_trainer.py": "in a staged folder",
}


def test_every_command_writes_through_one_writer(root):
    found = set()
    for file in (root / "stanford_alpaca").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = {each.value for each in node.args if isinstance(each, ast.Constant)}
            writes = name == "open" and modes & {"w", "a", "x", "wb", "ab", "xb"}
            if writes or name in ("write_text", "write_bytes", "save_file", "savefig"):
                found.add(file.relative_to(root / "stanford_alpaca").as_posix())
    assert found == set(OTHERWISE)
