"""Declares and checks the flags of commands, and ends a command that was given a wrong one."""

import errno
import importlib.util
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import fire
from fire.decorators import SetParseFns
from tqdm import tqdm

from stanford_alpaca.console import drop_output, is_main_process, open_streams, show
from stanford_alpaca.errors import UserError, first_line, nearest

T = TypeVar("T")
MOST, MOST_SEED = 2**31 - 1, 2**63 - 1  # of a count, and of a seed
LONGEST_NAME = 255  # bytes, of a file
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}  # the disk is full or broken
DATA = {"data", "data_path", "data_dir", "eval_path", "prompts", "text"}  # flags that name data
# optional modules -> what is installed
PIP_NAMES = {
    "deepspeed": "deepspeed",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "rouge_score": "rouge-score",
    "sacrebleu": "sacrebleu",
}


def end_at_once_on_sigint() -> None:
    """Lets SIGINT (Ctrl-C) end the process without a traceback, until a command runs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class RecordLimit:
    """The most MiB of a record of data, unpacked: a line, a field or a row."""

    mib: int = 256

    def set(self, mib: Any) -> None:
        """Sets --max_record_mib, a flag of every command that reads data."""
        check_whole("max_record_mib", mib, 1)
        self.mib = mib


RECORD_LIMIT = RecordLimit()
RECORD_HELP = """\
    max_record_mib: the most MiB of a record of data, unpacked, 256 by default. A JSON list may
            have 16 times it.
    """


def exit_on_user_error(command: Callable[[], Any], interrupted: str = "stopped") -> Any:
    """Runs a command, and exits if it raises a UserError, or KeyboardInterrupt (Ctrl-C).

    One rank prints the message as one line on standard error. The exit status is the error's. A
    full or broken disk is such an error, whoever was writing.

    Args:
        interrupted: the message of KeyboardInterrupt, whose status is 130.
    """
    open_streams()
    threading.excepthook = _of_thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of the imports, which are done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = command()
        sys.stdout.flush()
        return done
    except KeyboardInterrupt:
        show(f"\n{interrupted}", to_errors=True)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        _exit(error)
    except RecursionError as error:
        _exit(UserError(f"something that was read is nested too deep ({first_line(error)})"))
    except RuntimeError as error:
        if "home directory" not in str(error):  # of pathlib
            raise
        named = next((word for word in sys.argv[1:] if word.lstrip("-").startswith("~")), "~")
        _exit(UserError(f"{named}: there is no such user; write the path out"))
    except BrokenPipeError:  # the reader of a pipe, as head, has what it wanted
        drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _exit(UserError(f"{str(error.filename)[:80]}: {error.strerror}; give another path"))
        if error.errno not in DISK:
            raise
        drop_output()  # it may be what could not be written
        what = error.filename or "a file, or the standard output"
        _exit(UserError(f"{what}: the disk is full or broken ({error.strerror}); make room"))


def _of_thread(failed: threading.ExceptHookArgs) -> None:
    """Says nothing of a disk that fails under a tracker's thread: its next call raises the same."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in DISK):
        threading.__excepthook__(failed)


def _exit(error: UserError) -> NoReturn:
    """Prints an error's line and exits with its status."""
    # The first rank to exit takes the others down. Wait, so that rank 0 can print this error if it
    # has it too.
    if not is_main_process():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    for bar in list(getattr(tqdm, "_instances", [])):  # an open bar has not ended its line
        bar.close()
    # an error in a DataLoader's worker arrives with its traceback
    message = str(error).rpartition(f"{UserError.__module__}.UserError: ")[2]
    with suppress(OSError):  # nobody may read standard error
        show(f"error: {' '.join(message.split())}", to_errors=True)
    sys.exit(error.status)


def word() -> Any:
    """Declares a dataclass field for the next command-line word that belongs to no flag.

    It is None if there is no such word.
    """
    return field(default=None, metadata={"word": True})


def words() -> Any:
    """Declares a dataclass field, a tuple, for all command-line words that belong to no flag."""
    return field(default=(), metadata={"word": True})


def command(options: type, run: Callable[[Any], None]) -> Callable[..., None]:
    """Returns the function that ``fire`` calls for a command.

    The fields of the dataclass ``options`` are the command's flags, and its docstring is the help.
    ``run`` gets the options. Flags that hold text stay as they are typed, because fire would read
    ``a, b`` as a tuple.

    The returned function raises UserError for a flag that is not a field. What the dataclass raises
    passes through. A command with one of the flags in ``DATA`` has --max_record_mib, too.
    """
    parameters = [_parameter(each) for each in fields(options)]
    reads = bool(DATA & {each.name for each in parameters})
    limit = Parameter(
        "max_record_mib", Parameter.KEYWORD_ONLY, default=RecordLimit.mib, annotation=int
    )
    known = Signature(
        [
            *sorted([*parameters, *[limit][:reads]], key=lambda each: each.kind),
            Parameter("unknown", Parameter.VAR_KEYWORD),
        ]
    )
    texts = [each for each in known.parameters.values() if _is_text(each)]

    def called(*given: Any, **flags: Any) -> None:
        bound = known.bind(*given, **flags).arguments
        unknown = bound.pop("unknown", {})
        RECORD_LIMIT.set(bound.pop("max_record_mib", RecordLimit.mib))
        refuse_unknown(unknown, called)
        for each in parameters:
            check_switch(each.name, each.annotation, bound.get(each.name, False))
        run(
            options(
                **{
                    name: tuple(map(str, v)) if isinstance(v, tuple) else v
                    for name, v in bound.items()
                }
            )
        )

    called.__signature__ = known  # type: ignore[attr-defined]
    called.__doc__ = f"{options.__doc__}{RECORD_HELP if reads else ''}"
    in_place = [str for each in texts if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    return SetParseFns(*in_place, **{each.name: str for each in texts})(called)


def from_command_line(run: Callable[..., None], given: Sequence[str] | None = None) -> None:
    """Lets fire run a function of ``command`` on the command line, or on other words."""
    fire.Fire(run, command=join_texts(run, sys.argv[1:] if given is None else given))


def join_texts(run: Callable[..., None], words: Sequence[str]) -> list[str]:
    """Joins a flag of text with a value that begins with a dash, which fire would take for a flag.

    A next word that is a flag of the command stays one: the value is missing then.
    """
    known = {"help", *signature(run).parameters}
    texts = {each.name for each in signature(run).parameters.values() if _is_text(each)}
    joined: list[str] = []
    for each in words:
        last = _flag(joined[-1]) if joined else None
        if each.startswith("-") and _flag(each.partition("=")[0]) not in known and last in texts:
            joined[-1] += f"={each}"
        else:
            joined.append(each)
    return joined


def _flag(word: str) -> str | None:
    """Returns the name that ``--a-name`` stands for."""
    return word[2:].replace("-", "_") if word.startswith("--") else None


def _is_text(each: Parameter) -> bool:
    return each.annotation is str or str in get_args(each.annotation)


def _parameter(each: Field) -> Parameter:
    """Returns a dataclass field as a parameter that fire can read."""
    if not each.metadata.get("word"):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        return Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=each.type)
    if get_origin(each.type) is tuple:
        return Parameter(each.name, Parameter.VAR_POSITIONAL)
    return Parameter(each.name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=each.type)


def part_of(options: Any, cls: type[T]) -> T:
    """Makes a ``cls`` from those of a command's options that it has as fields."""
    names = [each.name for each in fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: getattr(options, name) for name in names})


def refuse_unknown(unknown: dict[str, Any], command: Callable) -> None:
    """Raises UserError for flags that a command does not have.

    ``--help`` prints the command's docstring and exits. fire calls a function before it rejects
    unknown flags. So that nothing is written by then, a command collects them in ``**unknown`` and
    calls this first.
    """
    if "help" in unknown:
        show(command.__doc__ or "")
        sys.exit(0)
    for name in unknown:
        raise UserError(
            f"unknown argument --{name}"
            f"{nearest(f'--{name}', [f'--{known}' for known in signature(command).parameters])}"
        )


def check_packages(what: str, *modules: str) -> None:
    """Raises UserError for a package of an extra that is not installed.

    Args:
        what: what needs it, as a flag or in words.
        modules: the names that are imported.
    """
    missing = [PIP_NAMES[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def check_switch(name: str, kind: Any, value: Any) -> None:
    """Raises UserError for a ``bool`` with another value, which would count as true."""
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"--{name} {value}: give True, False, or the flag alone")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises UserError for a flag with a word that is not known. None is no word."""
    known = list(known)
    if value is not None and value not in known:
        raise UserError(
            f"--{name} {value}: choose from {', '.join(known)}{nearest(str(value), known)}"
        )


def check_whole(name: str, value: Any, least: int, most: int = MOST) -> None:
    """Raises UserError unless the flag's value is an integer from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"--{name} {value}: give a whole number from {least} on")
    if value > most:
        raise UserError(f"--{name} {value}: give a whole number of at most {most:,}")


def check_path(name: str, value: str) -> None:
    """Raises UserError for a path that no file system takes, or one of a user who is not there."""
    reason = ""
    try:
        if max(len(os.fsencode(part)) for part in (*Path(value).parts, "")) > LONGEST_NAME:
            reason = os.strerror(errno.ENAMETOOLONG)
        elif value.startswith("~") and os.path.expanduser(value) == value:
            reason = f"there is no user {value.partition('/')[0]}"
        os.lstat(value)
    except OSError:
        pass  # whoever reads the file says so
    except ValueError as error:  # NUL, or half a surrogate pair
        reason = first_line(error)
    if reason:
        raise UserError(f"--{name} {value[:80]}: {reason}; give another path")


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises UserError unless the flag's value is a number between the bounds, these included."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and low <= value <= high):
        bounds = f"from {low:g} {'on' if high == math.inf else f'to {high:g}'}"
        raise UserError(f"--{name} {value}: give a number {bounds}")


def check_writable(name: str, path: Path) -> None:
    """Raises UserError unless a file or folder can be made at the path."""
    check_path(name, str(path))
    parent = path.absolute()
    while not os.path.lexists(parent):
        parent = parent.parent
    if parent != path.absolute() and not parent.is_dir():
        raise UserError(f"--{name} {path}: {parent} is a file; give another path")
    try:
        # permissions do not tell: root ignores them, and a disk may be mounted read-only
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(
            f"--{name} {path}: {parent} cannot be written to ({error.strerror}); give another path"
        ) from None


def choice(*values: str, default: str | None, help: str) -> Any:
    """Declares a dataclass field that takes one of a few words."""
    return field(default=default, metadata={"choices": list(values), "help": help})
