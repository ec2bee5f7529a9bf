"""Prints the lines of commands: once for all ranks, on any terminal, and without secrets."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator

# names of environment variables that hold a secret
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$", re.IGNORECASE)
SHORTEST = 8  # least characters of a secret; shorter ones would occur inside other words
# a hub token, or user:password in a URL
SECRET_LOOK = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)")
_secrets: set[str] = set()


def is_main_process() -> bool:
    """Returns whether this process (rank 0) prints and writes for all ranks."""
    return int(os.environ.get("RANK", "0")) == 0


def say(line: str) -> None:
    """Prints a line once for all ranks.

    If nobody reads any more, or the disk is full, this line and all later ones are lost. The work
    goes on.
    """
    if not is_main_process():
        return
    try:
        print(printable(line), flush=True)
    except OSError:
        drop_output()


def drop_output() -> None:
    """Sends what is printed from now on nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_secret(*values: str) -> None:
    """Hides these values in every line that a command prints."""
    _secrets.update(value for value in values if len(value) >= SHORTEST)


def printable(text: str) -> str:
    """Returns a text that any terminal or file accepts, with secrets replaced by ``***``.

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
    return SECRET_LOOK.sub("***", text).encode(errors="backslashreplace").decode()


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
