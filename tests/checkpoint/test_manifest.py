"""The manifest: which damage it finds, and that it refuses paths outside its folder."""

import json

import pytest

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.errors import ResumeError


@pytest.fixture
def folder(tmp_path):
    """Returns a checkpoint of two files, one of them in a subfolder."""
    place = tmp_path / "checkpoint-3"
    (place / "part").mkdir(parents=True)
    (place / "a.pt").write_bytes(b"first")
    (place / "part" / "b.distcp").write_bytes(b"second")
    manifest.write(
        place,
        manifest.entries_of(place, manifest.list_saved(place), flush=True),
        {"step": 3, "run": {"seed": 1}},
    )
    return place


def change_entry(folder, name, **changes):
    """Changes one entry of the manifest and writes a matching checksum."""
    content = manifest.read(folder)
    content["files"][name] = content["files"].get(name, {"bytes": 1, "sha256": ""}) | changes
    del content["sum"]
    files = content.pop("files")
    manifest.write(folder, files, {k: v for k, v in content.items() if k != "version"})


def test_a_whole_folder_has_no_problems_and_says_what_it_is(folder):
    assert manifest.problems(folder) == []
    content = manifest.read(folder)
    assert (content["step"], content["run"]) == (3, {"seed": 1})
    assert content["files"]["part/b.distcp"] == {
        "bytes": 6,
        "sha256": "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4",
    }
    assert manifest.size(folder) == 11
    (folder / "notes.txt").write_text("a user's")
    assert manifest.problems(folder) == []


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda f: (f / "a.pt").unlink(), "a.pt: not there"),
        (lambda f: (f / "a.pt").write_bytes(b"firs"), "a.pt: 4 bytes, not 5"),
        (
            lambda f: (f / "part" / "b.distcp").write_bytes(b"sEcond"),
            "part/b.distcp: its content has changed",
        ),
        (lambda f: (f / "scaler.pt").write_bytes(b"x"), "scaler.pt: was not saved with the others"),
        (
            lambda f: (f / "part" / ".metadata").write_bytes(b"x"),
            "part/.metadata: was not saved with the others",
        ),
        (
            lambda f: (f / "global_step3").symlink_to(f / "part"),
            "global_step3: leads out of the folder",
        ),
        (
            lambda f: (f / manifest.MANIFEST_FILE).unlink(),
            "manifest.json: not there, so nothing says what the files should be",
        ),
        (lambda f: (f / manifest.MANIFEST_FILE).write_text("{"), "manifest.json: cannot be read"),
        (
            lambda f: (f / manifest.MANIFEST_FILE).write_text("[" * 100_000),
            "manifest.json: cannot be read",
        ),
        (lambda f: (f / manifest.MANIFEST_FILE).write_text("[]"), "manifest.json: cannot be read"),
        (
            lambda f: flip(f / manifest.MANIFEST_FILE, '"step": 3', '"step": 4'),
            "manifest.json: damaged",
        ),
        (
            lambda f: change_entry(f, "../elsewhere"),
            "manifest.json: names ../elsewhere, which is outside the folder",
        ),
        (
            lambda f: change_entry(f, "/etc/passwd"),
            "manifest.json: names /etc/passwd, which is outside the folder",
        ),
        (lambda f: change_entry(f, "a.pt", bytes="many"), "manifest.json: damaged"),
        (lambda f: change_entry(f, "x" * 300), "cannot be read ([Errno 36] File name too long"),
    ],
)
def test_every_harm_is_found_and_named(folder, harm, problem):
    harm(folder)
    (found,) = manifest.problems(folder)
    assert found.startswith(problem)


def flip(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_sizes_alone_are_compared_on_request_and_other_versions_are_refused(folder):
    (folder / "a.pt").write_bytes(b"FIRST")
    assert manifest.problems(folder, contents=False) == [] and len(manifest.problems(folder)) == 1
    content = json.loads((folder / manifest.MANIFEST_FILE).read_text()) | {"version": 2}
    (folder / manifest.MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(ResumeError, match="another version"):
        manifest.read(folder)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in (
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-x",
        ".deleting-checkpoint-11",
        "model",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("no folder")
    assert [folder.name for folder in manifest.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-9",
    ]
