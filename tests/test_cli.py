"""The command ``emo``."""

import ast
import json
import os
import subprocess
import sys

import pytest

from stanford_alpaca import cli
from stanford_alpaca.errors import UserError
from stanford_alpaca.run.help import help_text
from stanford_alpaca.run.parse import parse


def alone(code: str, **environment: str) -> object:
    """Returns what code prints as JSON, run in a fresh interpreter without our variables."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", f"import json, os, sys\n{code}"]
    ended = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_help_imports_nothing_large():
    code = """
from stanford_alpaca import cli
cli.run(["--help"])
for name in cli.COMMANDS.keys() - {"train", "continual", "launch"}:
    cli.run([name, "--help"])
print(json.dumps([name for name in ("torch", "transformers", "datasets") if name in sys.modules]))
"""
    assert alone(code) == []


def test_variables_are_set_before_the_libraries_that_read_them():
    code = """
import stanford_alpaca
before = [os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules]
stanford_alpaca.attach_objective, stanford_alpaca.emo_loss
print(json.dumps([*before, os.environ["DS_ACCELERATOR"], "deepspeed" in sys.modules]))
"""
    assert alone(code) == ["passive", "500", False, "cpu", False]
    kept = """
import stanford_alpaca
print(json.dumps([os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")]))
"""
    assert alone(kept, OMP_WAIT_POLICY="active") == ["active", None]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_word_is_a_module_with_a_main(root, name):
    parts = cli.COMMANDS[name].module.split(".")
    file = root.joinpath("stanford_alpaca", *parts).with_suffix(".py")
    functions = [node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")]
    assert "main" in functions
    assert name in cli.usage()


def test_a_word_runs_its_module_with_the_rest(monkeypatch, capsys, root):
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as ended:
        cli.run(["chat", str(root / "none")])
    assert ended.value.code == 2 and sys.argv[1:] == [str(root / "none"), "--interactive"]
    assert "none: cannot load a model from here" in capsys.readouterr().err


def test_help_of_a_command_says_how_to_type_it(capsys):
    cli.run(["preview", "--help"])
    printed = capsys.readouterr().out
    assert "emo preview MODEL --data FILE" in printed and "python -m" not in printed


def test_a_reader_that_has_read_enough(tmp_path):
    code = "import sys; sys.argv[1:] = ['--help']; from stanford_alpaca.cli import main; main()"
    read, written = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", code], stdout=written, stderr=subprocess.PIPE)
    os.close(written)
    assert ended.returncode == 128 + 13 and ended.stderr == b""


def test_a_word_that_there_is_not():
    with pytest.raises(UserError, match=r"emo trian: no such command; did you mean train\?"):
        cli.run(["trian"])


def test_help_of_training_has_ours_first_and_one_spelling(arguments, capsys):
    ours, everything = help_text(), help_text(everything=True)
    assert len(ours.splitlines()) < len(everything.splitlines())
    for text in (ours, everything):
        flags = [line.strip() for line in text.splitlines() if line.startswith("  --")]
        assert len(flags) == len({flag.replace("-", "_") for flag in flags})
        assert flags[0] == "--model_name_or_path"
    assert "  --learning_rate\n" in everything and "  --learning_rate\n" not in ours
    for asked, text in (("--help", ours), ("--help-all", everything)):
        with pytest.raises(SystemExit) as ended:
            parse([*arguments(), asked])
        assert not ended.value.code and capsys.readouterr().out == f"{text}\n"
