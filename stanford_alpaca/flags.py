"""Flags that several commands have: how they are declared and checked, and how a wrong one ends the command."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from fire.decorators import SetParseFns
from tqdm import tqdm

from stanford_alpaca.console import is_main_process, printable
from stanford_alpaca.errors import UserError, nearest

T = TypeVar("T")


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
        message = str(error).rpartition(f"{UserError.__module__}.UserError: ")[
            2
        ]  # a DataLoader's worker sends a traceback
        print(f"error: {' '.join(printable(message).split())}", file=sys.stderr, flush=True)
        sys.exit(error.status)


def word() -> Any:
    """A dataclass field that takes the next word of the command line that belongs to no flag, or None."""
    return field(default=None, metadata={"word": True})


def words() -> Any:
    """A dataclass field, a tuple, that takes all words of the command line that belong to no flag."""
    return field(default=(), metadata={"word": True})


def command(options: type, run: Callable[[Any], None]) -> Callable[..., None]:
    """What ``fire`` calls for a command. The fields of the dataclass ``options`` are its flags, the docstring is its help.

    ``run`` gets the options. Flags that hold text stay as they are typed, because fire would read ``a, b`` as a tuple.

    Raises:
        UserError: a flag that is no field, and what the dataclass raises.
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
    """A dataclass's field as fire reads it."""
    if not each.metadata.get("word"):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        return Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=each.type)
    if get_origin(each.type) is tuple:
        return Parameter(each.name, Parameter.VAR_POSITIONAL)
    return Parameter(each.name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=each.type)


def part_of(options: Any, cls: type[T]) -> T:
    """A dataclass made of those of a command's options that it has as fields."""
    return cls(**{each.name: getattr(options, each.name) for each in fields(cls)})  # type: ignore[arg-type]


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
        with tempfile.TemporaryFile(
            dir=parent
        ):  # permissions do not tell: of root, of a disk that is mounted read-only
            pass
    except OSError as error:
        raise UserError(
            f"--{name} {path}: {parent} cannot be written to ({error.strerror}); give another path"
        ) from None


def choice(*values: str, default: str | None, help: str) -> Any:
    """A dataclass field that takes one of a few words."""
    return field(default=default, metadata={"choices": list(values), "help": help})
