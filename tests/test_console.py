"""What commands print: on any terminal, a full one and a closed one, without control characters."""

import ast
import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stanford_alpaca import generate
from stanford_alpaca.console import SECRET_SETTING, printable, show, storable
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error

DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
HOSTILE = [chr(code) for code in (*range(32), *range(127, 160), *DIRECTIONS) if code not in (9, 10)]


def python(code: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Runs a program that uses the ground of the package alone, as a shell would start it."""
    code = f"from stanford_alpaca.console import *\nfrom stanford_alpaca.flags import *\n{code}"
    command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("control", HOSTILE, ids=ascii)
def test_control_characters_do_not_reach_the_terminal(capsys, control):
    show(f"a{control}b\tc\nd")
    show(f"a{control}b", to_errors=True)
    printed = capsys.readouterr()
    assert printed.out == f"a\\u{ord(control):04x}b\tc\nd\n"
    assert printed.err == f"a\\u{ord(control):04x}b\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@hub/x?a=b", "https://***@hub/x?a=b"),
        ("s3://key:a@b:c@host", "s3://***@host"),
        (
            "https://hub/x?user=me&access_token=abc&b=1",
            "https://hub/x?user=me&access_token=***&b=1",
        ),
        ("name-hf_abcdefghijklmnop1234/x", "name-***/x"),
        ("sk-proj-abcdefghijklmnopqrst", "***"),
        ("ghp_abcdefghijklmnopqrstuvwx", "***"),
        (
            "https://hub/me@x pad_token: [PAD], mail me@hub",
            "https://hub/me@x pad_token: [PAD], mail me@hub",
        ),
        ("columns key=instruction", "columns key=instruction"),
    ],
)
def test_what_looks_like_a_secret_is_neither_shown_nor_stored(text, shown):
    assert printable(text) == shown
    assert storable({"a": [text, 1], text: {"b": text}}) == {"a": [shown, 1], shown: {"b": shown}}


@pytest.mark.parametrize(
    "text", ["github_pat_11ABCDEFG0_abcdefghij", *(f"gh{c}_{'a' * 24}" for c in "pousr")]
)
def test_every_kind_of_github_token_is_hidden(text):
    assert printable(text) == "***"


@pytest.mark.parametrize("name", ["token", "API_KEY", "client_secret", "password"])
def test_a_setting_of_that_name_is_a_secret(name):
    assert SECRET_SETTING.findall(f'{{"a": "b", "{name}": "made-up", "keys": "c"}}') == ["made-up"]


def test_what_is_printed_as_json_stays_json():
    text = "".join([*HOSTILE, "\ud800", "é", '"', "\\"])
    assert json.loads(printable(json.dumps([text], ensure_ascii=False))) == [text]


def test_text_is_printed_as_it_is():
    text = "a\tb\nअ \u200f— 日本 🙂 e\u0301"
    assert printable(text) == text and printable("a\r\nb") == "a\nb"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"\\xe9 \\u65e5"), ("latin-1", b"\xe9 \\u65e5")]
)
def test_terminals_of_other_encodings_print(encoding, shown):
    done = python("exit_on_user_error(lambda: show('é 日'))", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown + b"\n", b"")


@pytest.mark.parametrize(
    "shell", ["> /dev/full", ">&-", "| true", "2>&-", ">&- 2>&-", "> /dev/full 2> /dev/full"]
)
def test_output_that_nobody_takes_does_not_end_the_work(tmp_path, shell):
    """``say`` is what a training prints with, and ``print`` what other libraries do."""
    work = f"""
def work():
    lose_output()
    print("left over")
    print("to errors", file=sys.stderr)
    for number in range(3000):
        say(f"line {{number}}")
    with open({str(tmp_path / "done")!r}, "w") as file:
        file.write(str(number))
    print("left over")
exit_on_user_error(work)
os.write(1, b"stray")
"""
    done = python(work, shell)
    assert b"Traceback" not in done.stderr and (done.returncode == 0 or "|" in shell)
    assert (tmp_path / "done").read_text() == "2999"  # and not what was printed


def test_a_full_output_ends_other_commands_with_one_line():
    done = python("exit_on_user_error(lambda: show('a'))", "> /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and b"No space left" in done.stderr
    assert done.stderr.count(b"\n") == 1
    done = python("exit_on_user_error(lambda: print('a'))", "> /dev/full")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_anywhere_is_one_line(capsys, monkeypatch, number):
    """A tracker writes for itself."""

    def fail() -> None:
        raise OSError(number, os.strerror(number), "events.out")

    def write() -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        fail()

    monkeypatch.setattr("stanford_alpaca.flags.drop_output", lambda: None)
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(write)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("error: events.out: ")
    assert os.strerror(number) in line and line.count("\n") == 1


def test_other_errors_of_the_system_are_not_hidden():
    def write() -> None:
        raise OSError(errno.EBADF, "a mistake of ours")

    with pytest.raises(OSError, match="a mistake of ours"):
        exit_on_user_error(write)


def test_an_error_is_one_line_whatever_is_in_it(capsys):
    def refuse() -> None:
        raise UserError("a\x1b[2Jb\nc\rd\x9be\u202ef")

    with pytest.raises(SystemExit):
        exit_on_user_error(refuse)
    assert capsys.readouterr().err == "error: a\\u001b[2Jb c d\\u009be\\u202ef\n"


def test_the_package_prints_through_its_console(root):
    found = {}
    for file in (root / "stanford_alpaca").rglob("*.py"):
        calls = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        ]
        count = sum(getattr(call.func, "id", "") == "print" for call in calls)
        if count:
            found[file.relative_to(root / "stanford_alpaca").as_posix()] = count
    # ``where`` prints what a shell evaluates
    assert found == {"console.py": 1, "run/where.py": 1}


def test_an_ascii_stream_of_a_library_stays(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    exit_on_user_error(lambda: show("é"))
    assert sys.stdout.getvalue() == "é\n"


def test_paths_of_other_commands_that_cannot_be_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", "--out=a", "~nosuchuser/x"])
    for work, said in (
        (lambda: Path("~nosuchuser/x").expanduser(), "~nosuchuser/x: there is no such user"),
        (lambda: Path("x" * 256).is_file(), "xxx: File name too long"),
    ):
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(work)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and said in line


@pytest.mark.parametrize("rank", ["abc", "-1", ""])
def test_a_rank_that_is_no_number_hides_no_error(rank):
    code = "def f(): raise UserError('no')\nexit_on_user_error(f)"
    done = python(f"from stanford_alpaca.errors import UserError\n{code}", RANK=rank)
    assert (done.returncode, done.stderr) == (2, b"error: no\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_samples": 10**9},
            "--num_samples 1000000000: give a whole number of at most 100,000",
        ),
        ({"num_samples": 1e9}, "--num_samples 1000000000.0: give a whole number"),
        ({"batch_size": 2**31}, "--batch_size 2147483648: give a whole number of at most"),
        ({"seed": 2**63}, "--seed 9223372036854775808: give a whole number of at most"),
        ({"max_new_tokens": 10**12}, "--max_new_tokens 1000000000000: give a whole number of at"),
        ({"num_beams": 10**9}, "--num_beams 1000000000: give a whole number of at most 1,000"),
    ],
)
def test_numbers_that_no_memory_holds_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        generate.generate(generate.Options(checkpoints=("model",), instruction="a", **changes))


def test_bars_are_for_terminals(root):
    """A bar in a pipe or a log file is thousands of lines."""
    lines = [
        f"{file.name}: {line.strip()}"
        for file in sorted((root / "stanford_alpaca").rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if "tqdm(" in line and "disable=None" not in line
    ]
    assert [line.split(":")[0] for line in lines] == ["progress.py"]  # asks for a terminal itself
