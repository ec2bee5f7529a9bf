"""One run at a time in an output folder."""

import os
import subprocess
import sys

import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.lock import FILE, held


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    folder = tmp_path / "new" / "out"
    with held(folder):
        with pytest.raises(UserError, match="another run writes here"), held(folder):
            pass
        (folder / "model").write_text("x")
        with held(tmp_path / "other"):
            pass
    assert os.listdir(folder) == ["model"] and not (tmp_path / "other").exists()
    with held(folder):
        pass


def test_a_killed_run_keeps_nobody_out_and_nothing_written_is_nothing_left(tmp_path):
    lines = ["import os", "from pathlib import Path", "from stanford_alpaca.lock import held"]
    code = "\n".join([*lines, f"with held(Path({str(tmp_path / 'out')!r})): os.kill(os.getpid(), 9)"])
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert os.listdir(tmp_path / "out") == [FILE]
    with pytest.raises(ZeroDivisionError), held(tmp_path / "out"):
        _ = 1 / 0
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b"):
        _ = 1 / 0
    assert not (tmp_path / "a").exists()
