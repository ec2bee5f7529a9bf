"""Tests which signals the launcher passes to its ranks, and how it reports their exit statuses."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from stanford_alpaca import launch
from tests.ranks import TIMEOUT

RANK = """
trap 'echo TERM >>"$1/said.$RANK"' TERM
trap 'echo INT >>"$1/said.$RANK"; [ "$RANK" = 0 ] && exit 75; exit "$2"' INT
touch "$1/said.$RANK"
for _ in {1..600}; do sleep 0.05; done
"""


@pytest.mark.parametrize("status", [75, 3])
def test_a_second_ctrl_c_reaches_the_ranks_and_their_status_is_told(root, tmp_path, status):
    (tmp_path / "rank.sh").write_text(RANK)
    said = [tmp_path / f"said.{rank}" for rank in range(2)]

    def wait(text):
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if all(file.exists() and file.read_text() == text for file in said):
                return
            time.sleep(0.05)
        pytest.fail(f"{[file.exists() and file.read_text() for file in said]}, not {text!r}")

    command = [
        sys.executable,
        "-m",
        "stanford_alpaca.launch",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--no_python",
    ]
    with subprocess.Popen(
        [*command, "bash", str(tmp_path / "rank.sh"), str(tmp_path), str(status)], cwd=root
    ) as launcher:
        try:
            wait("")
            launcher.send_signal(signal.SIGTERM)
            wait("TERM\n")
            launcher.send_signal(signal.SIGTERM)  # a cluster repeats the signal
            time.sleep(0.3)
            launcher.send_signal(signal.SIGINT)
            wait("TERM\nINT\n")
            assert launcher.wait(TIMEOUT) == status
        finally:
            launcher.kill()


def test_ranks_that_cannot_meet_end_with_one_line(monkeypatch, capsys):
    """Without a loopback device, and with a port that another process has."""
    monkeypatch.setattr(launch.Ranks, "watch", lambda self: None)

    def unreachable(*args, **kwargs):
        raise OSError(101, "Network is unreachable")

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        argv = ["launch", "--master_addr", "127.0.0.1", "--master_port", port, "none.py"]
        monkeypatch.setattr(sys, "argv", argv)
        for place, said in (("", "EADDRINUSE"), ("socket.create_connection", "unreachable")):
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
                if place:
                    patch.setattr(place, unreachable)
                launch.main()
            line = capsys.readouterr().err.splitlines()[-1]
            assert end.value.code == 2
            assert line.startswith("error: the ranks cannot meet (") and said in line
