"""SIGTERM and SIGINT: a run that is asked to stop ends at a place from which it can go on."""

import contextlib
import os
import signal
import sys
import time
from types import FrameType

from stanford_alpaca.console import is_main_process
from stanford_alpaca.errors import Stopped

_HANDLED = (signal.SIGTERM, signal.SIGINT)
A_HUMAN = 2.0  # seconds after which a signal is not an echo of the first


class StopRequest:
    """The first of these signals, remembered while a run trains; before it trains, and at a second Ctrl-C, it ends at once.

    Whoever stops a run may signal a rank more than once: terminal or cluster, launcher, script. Processes that are forked
    while it trains, a data loader's, leave both signals to their parent.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self.training = False
        self._since = 0.0  # when it came
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return bool(self.name)

    def install(self) -> None:
        """From now on; only a main thread can."""
        for number in _HANDLED:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if not self.training:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if not self.training or (
            self.name and number == signal.SIGINT and time.monotonic() - self._since > A_HUMAN
        ):
            _say(2, f"stopped by {name}")
            sys.exit(Stopped.status)
        if not self.name:
            self.name, self._since = name, time.monotonic()
            _say(1, f"\n{name}: stopping after this step (Ctrl-C: at once, without a checkpoint)")


def ignore_signals() -> None:
    """From now on they change nothing."""
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)


def _say(descriptor: int, line: str) -> None:
    """Past Python's own buffer, which may be in the middle of a line of its own."""
    if is_main_process():
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(descriptor, f"{line}\n".encode())
