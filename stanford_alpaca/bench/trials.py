"""Runs trainings in processes of their own, each once, and keeps a small file about each."""

import json
import math
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from stanford_alpaca.checkpoint.manifest import MANIFEST_FILE, write_whole
from stanford_alpaca.console import show
from stanford_alpaca.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One training: a loss at a learning rate, from a seed."""

    loss: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.loss.replace(', ', '-')}-{self.learning_rate}-{self.seed}"


def run_module(log: Path, words: Iterable[object], environment: Mapping[str, str]) -> None:
    """Runs ``python -m WORDS`` and adds what it prints to a log.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-m", *map(str, words)]
    start = len(log.read_text("utf-8", "replace")) if log.exists() else 0
    with log.open("a", encoding="utf-8") as stream:
        status = subprocess.run(
            command, env=os.environ | dict(environment), stdout=stream, stderr=stream, check=False
        ).returncode
    if status:
        said = log.read_text("utf-8", "replace")[start:].split("\n")
        last = next((line for line in reversed(said) if line.strip()), "it said nothing")
        raise UserError(f"{command[2]} ended with status {status} ({last.strip()}); see {log}")


def tried(trial: Trial, folder: Path, train: Callable[[Path], None]) -> dict[str, Any]:
    """Returns what is kept of a trial; trains it before, unless that is known.

    Args:
        folder: it gets ``trials/NAME.json``, and the run itself ``runs/NAME``.
        train: trains into a folder.
    """
    file, run = folder / "trials" / f"{trial.name}.json", folder / "runs" / trial.name
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not (run / MANIFEST_FILE).exists():  # what a training writes last
            show(f"training {run.name}")
            train(run)
        found = json.loads((run / "eval_results.json").read_text())
        found |= json.loads((run / "train_results.json").read_text())
        kept = {
            "development_nll": found["eval_nll"],
            "seconds": found["train_runtime"],
            "peak_memory_mib": found["train_peak_memory_mib"],
            "supervised_tokens_per_s": found.get("train_supervised_tokens_per_s"),
        }
        write_whole(file, json.dumps(asdict(trial) | kept, indent=1) + "\n")
    return json.loads(file.read_text())


def best_rates(trials: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the learning rate of each loss with the least nll on the development set.

    Raises:
        UserError: a loss has no finite nll at any rate.
    """
    by_loss: dict[str, dict[float, float]] = {}
    for found in trials:
        of_loss = by_loss.setdefault(found["loss"], {})
        if math.isfinite(found["development_nll"]):
            of_loss[found["learning_rate"]] = found["development_nll"]
    for loss, found_nll in by_loss.items():
        if not found_nll:
            raise UserError(f"{loss}: nll on the development set is not finite at any rate")
    return {loss: min(nll, key=nll.__getitem__) for loss, nll in by_loss.items()}


class Pool:
    """Runs functions in threads, each with a device of its own.

    Args:
        environments: what a process gets in its environment, one for each device.
    """

    def __init__(self, environments: list[dict[str, str]]) -> None:
        self._free: queue.Queue[dict[str, str]] = queue.Queue()
        for each in environments:
            self._free.put(each)
        self._threads = ThreadPoolExecutor(len(environments))

    def submit(self, function: Callable[[dict[str, str]], T]) -> "Future[T]":
        def with_device() -> T:
            with ExitStack() as done:
                mine = self._free.get()
                done.callback(self._free.put, mine)
                return function(mine)

        return self._threads.submit(with_device)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
