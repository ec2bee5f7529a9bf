"""Processes of a run: waiting for them, killing them, and reading what they printed."""

import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.faults.harness import check

LIMIT = 600.0  # seconds that a run may take: a guard against hanging, not a measurement
LOCK = threading.RLock()  # processes are started and reaped by one thread at a time


def wait_until(holds: Callable[[], Any]) -> None:
    """Waits until ``holds()`` is true. Raises Lost if it takes too long."""
    end = time.monotonic() + LIMIT
    while not holds():
        check(time.monotonic() < end, "waited in vain")
        time.sleep(0.01)


def wait_for(processes: list, count: int, seconds: float) -> bool:
    """Returns whether ``count`` of the processes ended within so many seconds."""
    end, left = time.monotonic() + seconds, {process.sentinel for process in processes}
    while len(processes) - len(left) < count:
        ready = wait(list(left), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            return False
        left -= set(ready)
    return True


def kill(processes: list) -> None:
    """Kills all the processes at once, and waits until they have ended."""
    with LOCK:
        for process in processes:
            process.kill()
    wait_for(processes, len(processes), LIMIT)


def read(outputs: list[Path]) -> str:
    texts = [file.read_text(errors="replace") if file.exists() else "" for file in outputs]
    return (
        "\n".join(f"--- rank {rank}:\n{text}" for rank, text in enumerate(texts))
        if len(texts) > 1
        else texts[0]
    )
