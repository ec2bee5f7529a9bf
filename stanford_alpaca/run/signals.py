"""Handles SIGTERM and SIGINT: a run that is asked to stop ends where it can resume."""

import contextlib
import os
import signal
import sys
import time
from types import FrameType

from stanford_alpaca.console import is_main_process
from stanford_alpaca.errors import Stopped

_HANDLED = (signal.SIGTERM, signal.SIGINT)
A_HUMAN = 2.0  # seconds after which another signal is not an echo of the first


class StopRequest:
    """Remembers the first SIGTERM or SIGINT that arrives while a run trains.

    Before training starts, either signal ends the process at once. During training, a second
    Ctrl-C does, if it comes more than A_HUMAN seconds after the first signal. An earlier one may be
    an echo: the terminal or the cluster, the launcher and a script may each signal the same rank.

    Processes forked during training, such as the workers of a data loader, leave both signals to
    their parent.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self.training = False
        self._since = 0.0  # time.monotonic() when it came
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return bool(self.name)

    def install(self) -> None:
        """Starts to handle the signals. Only the main thread can call this."""
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
    """Makes this process ignore both signals from now on."""
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)


def _say(descriptor: int, line: str) -> None:
    """Writes a line past Python's own buffer, which a signal may interrupt in mid-line."""
    if is_main_process():
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(descriptor, f"{line}\n".encode())
