"""Processes of a run: waiting for them, ending them, reading what they printed."""

import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.faults.harness import check

LIMIT = 600.0  # seconds that a run may take: a guard against hanging, no measurement
LOCK = threading.RLock()  # processes are started and reaped by one thread at a time


def wait_until(holds: Callable[[], Any]) -> None:
    """Looks again and again. Raises Lost if it takes too long."""
    end = time.monotonic() + LIMIT
    while not holds():
        check(time.monotonic() < end, "waited in vain")
        time.sleep(0.01)


def wait_for(processes: list, count: int, seconds: float) -> bool:
    """Whether so many of the processes have ended within that time."""
    end, left = time.monotonic() + seconds, {process.sentinel for process in processes}
    while len(processes) - len(left) < count:
        ready = wait(list(left), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            return False
        left -= set(ready)
    return True


def kill(processes: list) -> None:
    """Ends all of them at once, and waits for that."""
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
