"""Makes the runs of a part of ``real.py``: each once, by any number of processes."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stanford_alpaca.errors import UserError
from stanford_alpaca.run.lock import locked

Run = dict[str, Any]  # what a job leaves as JSON
Jobs = dict[str, Callable[[], Run]]


class Places(NamedTuple):
    """Where a part finds the models and the data, and where all parts leave what they make."""

    models: Path
    data: Path
    work: Path  # adapters
    runs: Path  # one JSON a run, in a folder a part


def make(jobs: Jobs, folder: Path) -> None:
    """Makes FOLDER/NAME.json of each job, unless it exists or another process makes it."""
    made = True
    while made:  # what another process has left unfinished is made in the next round
        made = any([_make(folder, name, job) for name, job in jobs.items()])


def read(jobs: Jobs, folder: Path) -> list[Run]:
    """Returns the runs that are finished, in the jobs' order."""
    files = (folder / f"{name}.json" for name in jobs)
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _make(folder: Path, name: str, job: Callable[[], Run]) -> bool:
    file = folder / f"{name}.json"
    with contextlib.ExitStack() as taken:
        try:  # the lock ends with its process, however that ends
            taken.enter_context(locked(folder / f"{name}.taken"))
        except UserError:
            return False
        if file.exists():
            return False
        print(f"making {name}", flush=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(job(), allow_nan=False, separators=(",", ":")) + "\n")
        part.replace(file)
    return True
