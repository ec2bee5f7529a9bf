"""Tests that only one run at a time uses an output folder."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.run.lock import LOCK_FILE, locked

LINES = ["import os", "from pathlib import Path", "from stanford_alpaca.run.lock import locked"]


def script(*lines):
    return [sys.executable, "-c", "\n".join([*LINES, *lines])]


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    folder = tmp_path / "new" / "out"
    with locked(folder):
        with pytest.raises(UserError, match="another run writes here"), locked(folder):
            pass
        second = subprocess.run(
            script(f"with locked(Path({str(folder)!r})): pass"), capture_output=True, text=True
        )
        assert "another run writes here" in second.stderr
        (folder / "model").write_text("x")
        with locked(tmp_path / "other"):
            pass
    assert os.listdir(folder) == ["model"] and not (tmp_path / "other").exists()
    with locked(folder):
        pass


def test_a_killed_run_keeps_nobody_out_and_nothing_written_is_nothing_left(tmp_path):
    code = f"with locked(Path({str(tmp_path / 'out')!r})): os.kill(os.getpid(), 9)"
    assert subprocess.run(script(code)).returncode == -9
    assert os.listdir(tmp_path / "out") == [LOCK_FILE]
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "out"):
        _ = 1 / 0
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b"):
        _ = 1 / 0
    assert not (tmp_path / "a").exists()


def test_what_a_killed_run_has_forked_keeps_nobody_out(tmp_path):
    child = "    os.read(0, 1), os._exit(0)"  # waits until its input is closed
    lines = [
        f"with locked(Path({str(tmp_path)!r})):",
        "  if os.fork() == 0:",
        child,
        "  os.kill(os.getpid(), 9)",
    ]
    with subprocess.Popen(script(*lines), stdin=subprocess.PIPE) as process:
        assert process.wait() == -9
        with locked(tmp_path):
            pass
        process.stdin.close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path):
        pass
    assert "its file system has no locks" in capsys.readouterr().out
