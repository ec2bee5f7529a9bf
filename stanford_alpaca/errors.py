"""How a command ends when its user gave it something it cannot use."""

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature
from typing import Any


class UserError(ValueError):
    """Something the user can mend. The message is one line: what came, what was wanted, what to do."""


def exit_on_user_error(command: Callable[[], Any]) -> None:
    """Runs a command; a UserError becomes one line on standard error (from rank 0) and exit status 2."""
    try:
        command()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean X?`` for the known name nearest to a mistyped one, or nothing."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def refuse_unknown(unknown: dict[str, Any], command: Callable) -> None:
    """Raises UserError for flags that a command does not have.

    fire calls a function before it rejects unknown flags; a command that is to write nothing then collects them in
    ``**unknown`` and calls this first.
    """
    for name in unknown:
        raise UserError(f"unknown argument --{name}{nearest(name, list(signature(command).parameters))}")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises UserError unless the flag's value is a whole number from ``least`` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"--{name} {value}: give a whole number from {least} on")
