"""Errors that end a command with one line for its user, and helpers that write the line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can fix.

    The message is one line: what came, what was wanted, what to do.
    """

    status = 2  # the command's exit status


class ResumeError(UserError):
    """What was saved is damaged, or belongs to another run than this one."""

    status = 3


class Stopped(UserError):
    """A signal asked the run to stop, and it has stopped. It can be resumed."""

    status = 75  # EX_TEMPFAIL of sysexits.h


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable, most: int = 12) -> str:
    """Joins names with commas. Of more than ``most`` it lists the first and counts the others."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )


def nearest(name: str, known: list[str]) -> str:
    """Returns ``; did you mean X?`` for the known name nearest to a mistyped one, or nothing."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
