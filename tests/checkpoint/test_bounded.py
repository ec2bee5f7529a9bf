"""Settings and records of strangers: bounded, with every error in one line."""

import os
import tracemalloc

import pytest

from stanford_alpaca.checkpoint import bounded
from stanford_alpaca.checkpoint.bounded import read_json, read_text, read_yaml
from stanford_alpaca.checkpoint.run_file import read_run
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error
from stanford_alpaca.run.config_file import with_config

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
BAD_YAML = {
    "laughs": (LAUGHS, "its aliases stand for more than 100,000 values"),
    "merged": (MERGED, "<< is not read, write the values out at line 3 column 3"),
    "endless": ("a: &a [*a]\n", "its aliases stand for more than 100,000 values"),
    "deep list": ("a: " + "[" * 5000, "nested too deep"),
    "deep map": ("{a: " * 5000, "nested too deep"),
    "twice": ("mode: emo\nseed: 1\nmode: mle\n", "the key 'mode' stands twice at line 3 column 1"),
    "twice inside": ("a:\n  b: {c: 1, c: 2}\n", "the key 'c' stands twice at line 2 column 13"),
    "code": ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "a long number": ("a: " + "9" * 5000, "Exceeds the limit"),
    "control": ("a: \x1b[2J", "special characters are not allowed"),
    "not UTF-8": (b"a: \xff", "can't decode byte"),
    "large": ("a: " + "x" * 2**20, "it has more than 1 MiB"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_hostile_yaml_is_one_line(tmp_path, name):
    content, said = BAD_YAML[name]
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as refused:
        read_yaml(file)
    assert said in str(refused.value)
    with pytest.raises(UserError, match=r"--config .*run.yaml: cannot be read") as ended:
        with_config(["--config", str(file)])
    assert "\n" not in str(ended.value)
    assert read_run(tmp_path) is None  # a record of a stranger


def test_harmless_yaml_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &x [1, 2]\nb: *x\nc: {d: *x, e: no}\n")
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": [1, 2], "e": False},
    }


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="it is no file"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="it is no file"):
        read(tmp_path / "pipe" if read is read_yaml else type(tmp_path)("/dev/zero"))
    with pytest.raises(OSError, match="No such file"):
        read(tmp_path / "none")


def test_json_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "deep.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="nested too deep"):
        read_json(tmp_path / "deep.json")
    monkeypatch.setattr(bounded.read_text, "__defaults__", (2**20, "utf-8"))
    (tmp_path / "long.json").write_text('"' + "x" * 2**20 + '"')
    with pytest.raises(ValueError, match="it has more than 1 MiB"):
        read_json(tmp_path / "long.json")


def test_what_is_nested_too_deep_anywhere_is_one_line(capsys):
    def down() -> None:
        down()

    with pytest.raises(SystemExit) as end:
        exit_on_user_error(down)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: something that was read is nested too deep")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data_path: [f.json, --lora, 'True']", "data_path has the value --lora, which looks like"),
        ("mode: --trust_remote_code", "mode has the value --trust_remote_code"),
        ("mode: ' --lora'", "mode has the value  --lora"),
        ("mode: -h", "mode has the value -h"),
        ("lora=True: x", "'lora=True' is not the name of a flag"),
        ("help: True", "'help' is not the name of a flag"),
        ("config: other.yaml", "'config' is not the name of a flag"),
        ("'a b': 1", "'a b' is not the name of a flag"),
        ("1: 2", "1 is not the name of a flag"),
        ("data-path: a\ndata_path: b", "data_path stands twice"),
        ("data_path: [[a]]", "a list in a list"),
    ],
)
def test_a_value_of_a_config_cannot_become_a_flag(tmp_path, content, said):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        with_config(["--config", str(tmp_path / "a.yaml")])
    assert said in str(refused.value)


def test_numbers_and_words_of_a_config_stay_values(tmp_path):
    (tmp_path / "a.yaml").write_text("learning-rate: -1e-3\ndata_path: [a-b.json, -1]\nseed: 3\n")
    argv, _ = with_config(["--config", str(tmp_path / "a.yaml"), "--seed", "4"])
    assert argv == ["--learning-rate", "-1e-3", "--data_path", "a-b.json", "-1", "--seed", "4"]


def test_no_more_of_a_file_is_read_than_it_may_hold(tmp_path):
    (tmp_path / "run.yaml").touch()
    os.truncate(tmp_path / "run.yaml", 2**26)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="it has more than 1 MiB"):
            read_yaml(tmp_path / "run.yaml")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
