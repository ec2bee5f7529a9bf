"""Tests the Slurm script with fake Slurm commands.

Checks what it starts, how it ends, and that a signal reaches the job.
"""

import os
import signal
import subprocess
import time

import pytest

from tests.ranks import TIMEOUT

SRUN = '#!/bin/sh\nshift\nexec "$@"\n'  # runs the command on this machine, without srun's own flag
SCONTROL = "#!/bin/sh\necho node7\necho node8\n"


@pytest.fixture
def submit(root, tmp_path):
    """Starts the script as sbatch would on the first of two nodes.

    A shell script replaces Python.
    """

    def start(python: str) -> subprocess.Popen:
        for name, text in {
            "srun": SRUN,
            "scontrol": SCONTROL,
            "python": f"#!/bin/bash\n{python}\n",
        }.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        slurm = {
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_JOB_ID": "12345",
        }
        environment = (
            os.environ
            | slurm
            | {"SLURM_SUBMIT_DIR": str(root), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        )
        environment.pop("PYTHON", None)
        command = ["bash", str(root / "examples" / "multi_node" / "slurm.sh"), "--mode", "emo"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return start


def test_a_torchrun_on_every_node_meets_at_the_first_and_its_status_is_the_jobs(submit):
    job = submit('echo "$*"; exit 3')
    printed, _ = job.communicate(timeout=TIMEOUT)
    assert (
        printed.split()
        == (
            "-m stanford_alpaca.launch --nnodes 2 --nproc_per_node 4 --rdzv_id 12345 "
            "--rdzv_backend c10d --rdzv_endpoint node7:22345 -m stanford_alpaca.train --mode emo"
        ).split()
    )
    assert job.returncode == 3


def test_a_signal_to_the_job_reaches_what_trains(submit, tmp_path):
    job = submit(
        f'trap "echo saved; exit 5" TERM; touch {tmp_path}/started; while :; do sleep 0.05; done'
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=TIMEOUT)
    assert (printed, job.returncode) == ("saved\n", 5)
