"""How a command ends when its user gave it something it cannot use."""

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

from tqdm import tqdm

SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$", re.IGNORECASE)  # of an environment variable
SHORTEST = 8  # characters of a secret; shorter ones stand in other words
SECRET_LOOK = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)")  # a hub token; user:password in a URL
_secrets: set[str] = set()


class UserError(ValueError):
    """Something the user can mend. The message is one line: what came, what was wanted, what to do."""

    status = 2  # with which the command ends


class ResumeError(UserError):
    """What was saved is damaged, or was saved by another run than this one would be."""

    status = 3


class Stopped(UserError):
    """A signal asked the run to stop, and it has. Run again, it goes on."""

    status = 75  # EX_TEMPFAIL of sysexits.h


def exit_on_user_error(command: Callable[[], Any]) -> Any:
    """Runs a command; a UserError becomes one line on standard error (from one rank) and its exit status."""
    try:
        return command()
    except UserError as error:
        if not is_main_process():  # the first rank to end takes the others down: let the first one speak, if it has this error
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        for bar in list(getattr(tqdm, "_instances", [])):  # which has not ended its line
            bar.close()
        message = str(error).rpartition(f"{UserError.__module__}.UserError: ")[2]  # a DataLoader's worker sends a traceback
        print(f"error: {' '.join(printable(message).split())}", file=sys.stderr, flush=True)
        sys.exit(error.status)


def is_main_process() -> bool:
    """Whether this process writes and prints for all."""
    return int(os.environ.get("RANK", "0")) == 0


def say(line: str) -> None:
    """Prints a line once for all ranks."""
    if is_main_process():
        print(printable(line), flush=True)


def keep_secret(*values: str) -> None:
    """No line that a command prints will hold these values."""
    _secrets.update(value for value in values if len(value) >= SHORTEST)


def printable(text: str) -> str:
    """A text as any terminal or file takes it, without tokens, keys and passwords: those of the environment, those given to
    ``keep_secret``, and what looks like one."""
    named = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    for secret in sorted(named | _secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return SECRET_LOOK.sub("***", text).encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """What another library's error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the hub's client from announcing every retry: the error that follows says it in a line."""
    retries = logging.getLogger("huggingface_hub")
    level = retries.level
    retries.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        retries.setLevel(level)


def listed(names: Iterable, most: int = 12) -> str:
    """Names with commas; of many, the first."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean X?`` for the known name nearest to a mistyped one, or nothing."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def refuse_unknown(unknown: dict[str, Any], command: Callable) -> None:
    """Raises UserError for flags that a command does not have; ``--help`` prints its docstring and ends.

    fire calls a function before it rejects unknown flags; a command that is to write nothing then collects them in
    ``**unknown`` and calls this first.
    """
    if "help" in unknown:
        print(command.__doc__)
        sys.exit(0)
    for name in unknown:
        raise UserError(
            f"unknown argument --{name}{nearest(f'--{name}', [f'--{known}' for known in signature(command).parameters])}"
        )


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises UserError unless the flag's value is a whole number from ``least`` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"--{name} {value}: give a whole number from {least} on")


def check_writable(name: str, path: Path) -> None:
    """Raises UserError unless a file or folder could be made at the path."""
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if parent != path.absolute() and not parent.is_dir():
        raise UserError(f"--{name} {path}: {parent} is a file; give another path")
    try:
        with tempfile.TemporaryFile(dir=parent):  # permissions do not tell: of root, of a disk that is mounted read-only
            pass
    except OSError as error:
        raise UserError(f"--{name} {path}: {parent} cannot be written to ({error.strerror}); give another path") from None
