"""How a command ends when its user gave it something it cannot use."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend. The message is one line: what came, what was wanted, what to do."""

    status = 2  # with which the command ends


class ResumeError(UserError):
    """What was saved is damaged, or was saved by another run than this one would be."""

    status = 3


class Stopped(UserError):
    """A signal asked the run to stop, and it has. Run again, it goes on."""

    status = 75  # EX_TEMPFAIL of sysexits.h


def first_line(error: BaseException) -> str:
    """What another library's error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable, most: int = 12) -> str:
    """Names with commas; of many, the first."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean X?`` for the known name nearest to a mistyped one, or nothing."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
