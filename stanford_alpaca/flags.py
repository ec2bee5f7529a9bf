"""Declares and checks the flags of commands, and ends a command that was given a wrong one."""

import importlib.util
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from fire.decorators import SetParseFns
from tqdm import tqdm

from stanford_alpaca.console import drop_output, is_main_process, printable
from stanford_alpaca.errors import UserError, nearest

T = TypeVar("T")
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


def exit_on_user_error(command: Callable[[], Any], interrupted: str = "stopped") -> Any:
    """Runs a command, and exits if it raises a UserError, or KeyboardInterrupt (Ctrl-C).

    One rank prints the message as one line on standard error. The exit status is the error's.

    Args:
        interrupted: the message of KeyboardInterrupt, whose status is 130.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of the imports, which are done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return command()
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        # The first rank to exit takes the others down. Wait, so that rank 0 can print this error
        # if it has it too.
        if not is_main_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        for bar in list(getattr(tqdm, "_instances", [])):  # an open bar has not ended its line
            bar.close()
        # an error in a DataLoader's worker arrives with its traceback
        message = str(error).rpartition(f"{UserError.__module__}.UserError: ")[2]
        print(f"error: {' '.join(printable(message).split())}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except BrokenPipeError:  # the reader of a pipe, as head, has what it wanted
        drop_output()
        sys.exit(128 + signal.SIGPIPE)


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
    passes through.
    """
    parameters = [_parameter(each) for each in fields(options)]
    known = Signature(
        [
            *sorted(parameters, key=lambda each: each.kind),
            Parameter("unknown", Parameter.VAR_KEYWORD),
        ]
    )
    texts = [
        each
        for each in known.parameters.values()
        if each.annotation is str or str in get_args(each.annotation)
    ]

    def called(*given: Any, **flags: Any) -> None:
        bound = known.bind(*given, **flags).arguments
        refuse_unknown(bound.pop("unknown", {}), called)
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
    called.__doc__ = options.__doc__
    in_place = [str for each in texts if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    return SetParseFns(*in_place, **{each.name: str for each in texts})(called)


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
        print(command.__doc__)
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


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises UserError unless the flag's value is an integer from ``least`` to 2^63 - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"--{name} {value}: give a whole number from {least} on")
    if value >= 2**63:
        raise UserError(f"--{name} {value}: give a number below 2^63")


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises UserError unless the flag's value is a number between the bounds, these included."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and low <= value <= high):
        bounds = f"from {low:g} {'on' if high == math.inf else f'to {high:g}'}"
        raise UserError(f"--{name} {value}: give a number {bounds}")


def check_writable(name: str, path: Path) -> None:
    """Raises UserError unless a file or folder can be made at the path."""
    parent = path.absolute()
    while not parent.exists():
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
