"""Runs a training as ``train_emo.sh`` does, without bash: ``emo train`` and ``emo continual``.

It chooses where the training runs, waits for it, passes signals on, and has a report written at its
end.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from stanford_alpaca.console import say
from stanford_alpaca.run.where import Devices, Where, where_to_run

PASSED_ON = {  # signal to this process -> signal to the training
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
REPORTED = "100"  # records of --eval_path that a report measures


def run(module: str, argv: list[str], reported: bool) -> None:
    """Runs a training with the command line completed. Ends the process with its status.

    Args:
        reported: whether a report is written into the output folder, unless REPORT=no.
    """
    where = where_to_run(argv, os.environ, Devices.found())
    for note in where.notes:
        say(note)
    command = [sys.executable, "-m", module]
    if where.launched:
        ranks = ["--standalone", "--nproc_per_node", str(where.processes)]
        command = [sys.executable, "-m", "stanford_alpaca.launch", *ranks, "-m", module]
    status = wait_for([*command, *where.flags], os.environ | where.environment)
    if status == 0 and reported:
        report_on(where, Path(where.value("output_dir") or "trainer_output"))
    sys.exit(status)


def wait_for(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command and returns its exit status, as a shell reports it.

    It gets a process group of its own: a signal reaches it only through this process, once.
    """
    with subprocess.Popen(command, env=environment, process_group=0) as training:
        for number, passed in PASSED_ON.items():
            signal.signal(number, lambda *_, passed=passed: training.send_signal(passed))
        status = training.wait()
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    return status if status >= 0 else 128 - status


def report_on(where: Where, output: Path) -> None:
    """Writes report.html, if there is none, and says what to do next."""
    report = output / "report.html"
    if os.environ.get("REPORT") != "no" and not report.exists():
        command = [sys.executable, "-m", "stanford_alpaca.evaluation.report"]
        command += [where.value("model_name_or_path"), str(output)]
        limit = where.value("max_record_mib")
        command += ["--max_record_mib", limit] if limit else []
        if subprocess.call([*command, "--out", str(report), "--limit", REPORTED]):
            say("report: none could be written")
    say(f"checkpoint: {output}\ntalk to it: emo chat {shlex.quote(str(output))}")
