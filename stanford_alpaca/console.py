"""What commands print: once for all ranks, on any terminal, and without secrets."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator

SECRET_NAME = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD)S?$", re.IGNORECASE
)  # of an environment variable
SHORTEST = 8  # characters of a secret; shorter ones stand in other words
SECRET_LOOK = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)"
)  # a hub token; user:password in a URL
_secrets: set[str] = set()


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
    named = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST
    }
    for secret in sorted(named | _secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return SECRET_LOOK.sub("***", text).encode(errors="backslashreplace").decode()


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
