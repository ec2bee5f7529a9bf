"""Prints the lines of commands: once for all ranks, on any terminal, and without secrets.

Whatever a command prints passes through ``printable``. Text of others then moves no cursor, sets no
title, and hides nothing.
"""

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# names of environment variables that hold a secret
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$", re.IGNORECASE)
# a setting inside a flag of several, in JSON, that holds one
SECRET_SETTING = re.compile(r'"[^"]*(?:token|key|secret|password)"\s*:\s*"([^"]+)"', re.IGNORECASE)
SHORTEST = 8  # least characters of a secret; shorter ones would occur inside other words
# tokens of the hub, of OpenAI, of GitHub; in a URL user:password, and what a query calls a secret
SECRET_LOOK = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,})"
    r"|(?<=://)[^/?#\s]+(?=@)"
    r"|(?P<name>[?&][\w-]*(?:token|key|secret|password|signature)=)[^&#\s'\"]+",
    re.IGNORECASE,
)
_secrets: set[str] = set()
# what a terminal obeys, but tabs and newlines: C0, DEL, C1, and what changes the direction of text
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def is_main_process() -> bool:
    """Returns whether this process (rank 0) prints and writes for all ranks."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0  # ``check_environment`` refuses other words


def say(line: str) -> None:
    """Prints a line once for all ranks.

    If nobody reads any more, or the disk is full, this line and all later ones are lost. The work
    goes on.
    """
    if not is_main_process():
        return
    try:
        show(line)
    except OSError:
        drop_output()


def show(text: str, end: str = "\n", to_errors: bool = False) -> None:
    """Prints a text on standard output or standard error. Raises OSError if that fails."""
    print(printable(text), end=end, file=sys.stderr if to_errors else sys.stdout, flush=True)


def open_streams() -> None:
    """Makes standard output and standard error take any text, also if they are closed.

    A closed one is sent nowhere. Otherwise the next file that is opened would get its number, and
    whatever a library prints. A character that the terminal's encoding lacks is escaped.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Lossy:
    """A stream that is sent nowhere once it cannot be written to."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            drop_output(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop_output(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lose_output() -> None:
    """Lets no line end a training, whoever prints it: what cannot be printed is lost."""
    open_streams()
    sys.stdout, sys.stderr = _Lossy(sys.stdout), _Lossy(sys.stderr)  # type: ignore[assignment]


def drop_output(stream: TextIO | None = None) -> None:
    """Sends what is printed from now on nowhere. By default that is standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def keep_secret(*values: str) -> None:
    """Hides these values in every line that a command prints."""
    _secrets.update(value for value in values if len(value) >= SHORTEST)


def printable(text: str) -> str:
    """Returns a text that any terminal or file accepts, with secrets replaced by ``***``.

    Control characters except tabs and newlines are escaped, as JSON does it. Secrets: see
    ``without_secrets``.
    """
    text = CONTROL.sub(_escape, without_secrets(text).replace("\r\n", "\n"))
    return text.encode(errors="backslashreplace").decode()


def _escape(found: re.Match) -> str:
    return f"\\u{ord(found[0]):04x}"


def without_secrets(text: str) -> str:
    """Returns a text with secrets replaced by ``***``.

    Secrets are the tokens, keys and passwords of the environment, the values given to
    ``keep_secret``, and whatever looks like one.
    """
    named = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST
    }
    for secret in sorted(named | _secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return SECRET_LOOK.sub(lambda found: (found["name"] or "") + "***", text)


def storable(value: Any) -> Any:
    """Returns a value as files and trackers may hold it: without secrets in any of its texts."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return [storable(each) for each in value]
    if isinstance(value, dict):
        return {storable(name): storable(each) for name, each in value.items()}
    return value


def align(table: list[list[str]]) -> str:
    """Formats rows of cells, the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(first),
                *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True)),
            ]
        ).rstrip()
        for row in table
    )


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the hub's client from announcing every retry.

    The error that follows says it in one line.
    """
    retries = logging.getLogger("huggingface_hub")
    level = retries.level
    retries.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        retries.setLevel(level)
