"""``emo train``: signals, exit statuses, and what comes after a training."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from stanford_alpaca.run import launcher
from stanford_alpaca.run.where import Where

PARENT = "import os, sys; from stanford_alpaca.run.launcher import wait_for\n"
PARENT += "sys.exit(wait_for([sys.executable, '-c', sys.argv[1]], dict(os.environ)))"
CHILD = """
import signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.3)  # a second signal would come now
print([signal.Signals(number).name for number in got], flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("sent", "got"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")]
)
def test_a_signal_reaches_the_training_once(root, sent, got):
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        os.killpg(parent.pid, signal.Signals[sent])  # to the whole group, as a terminal does
        assert parent.stdout.readline() == f"['{got}']\n"
        assert parent.wait() == 75


@pytest.mark.parametrize(("code", "status"), [("exit(3)", 3), ("import os; os.kill(0, 9)", 137)])
def test_the_status_is_that_of_the_training(code, status):
    assert launcher.wait_for([sys.executable, "-c", code], dict(os.environ)) == status
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("wanted", ["", "no"])
def test_a_report_is_written_once(tmp_path, monkeypatch, capfd, wanted):
    monkeypatch.setenv("REPORT", wanted)
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 1)
    where = Where(1, False, ["--model_name_or_path", "base", "--output_dir", str(tmp_path)])
    launcher.report_on(where, tmp_path)
    said = capfd.readouterr().out
    assert said.endswith(f"checkpoint: {tmp_path}\ntalk to it: emo chat {tmp_path}\n")
    if wanted == "no":
        assert not calls
        return
    assert "report: none could be written" in said
    module = ["-m", "stanford_alpaca.evaluation.report", "base", str(tmp_path)]
    assert calls[0][1:5] == module and str(tmp_path / "report.html") in calls[0]
    assert "--max_record_mib" not in calls[0]
    launcher.report_on(replace(where, flags=[*where.flags, "--max_record_mib", "7"]), tmp_path)
    assert calls[1][calls[1].index("--max_record_mib") + 1] == "7"
    (tmp_path / "report.html").touch()
    launcher.report_on(where, tmp_path)
    assert len(calls) == 2


def test_what_comes_after_a_training_is_of_its_output_folder(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(launcher, "wait_for", lambda *_: 0)
    monkeypatch.setattr(launcher, "report_on", lambda _, output: said.append(output))
    flags = ["--model_name_or_path", "base", "--output_dir", str(tmp_path / "one")]
    with pytest.raises(SystemExit) as end:
        launcher.run("stanford_alpaca.train", flags, reported=True)
    assert end.value.code == 0 and said == [tmp_path / "one"]
