"""Expands ``--config FILE`` into flags, without importing anything large: launchers wait for it."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stanford_alpaca.checkpoint.bounded import read_yaml
from stanford_alpaca.checkpoint.run_file import MADE_WITH
from stanford_alpaca.errors import UserError, first_line

CODE = {  # flags that run code of others: how to give them, and values that do not
    "loss": ("--loss FILE.py:NAME", ()),
    "trust_remote_code": ("--trust_remote_code", ("False", "false", "no")),
}
NAME = re.compile(r"[A-Za-z]\w*")  # of a flag
OPTION = re.compile(r"\s*(--|-[A-Za-z])")  # the beginning of one on a command line


def with_config(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Expands --config: returns the whole command line, and the file's ``made_with`` section.

    The file's flags come first. Those that the command line has too are left out.
    """
    places = [
        i for i, token in enumerate(argv) if token == "--config" or token.startswith("--config=")
    ]
    if not places:
        return argv, {}
    if len(places) > 1:
        raise UserError("--config was given twice: put all into one file")
    (place,) = places
    separate = argv[place] == "--config"
    if separate and len(argv) == place + 1:
        raise UserError("--config needs the name of a YAML file")
    name = argv[place + 1] if separate else argv[place].partition("=")[2]
    rest = argv[:place] + argv[place + (2 if separate else 1) :]
    try:
        values = read_yaml(Path(name))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {name}: cannot be read ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {name}: wanted a line 'flag: value' for each flag")
    made_with = values.pop(MADE_WITH, {})
    _check_flags(name, values)
    return (
        _without_code(name, _one_objective(values, rest), rest),
        made_with if isinstance(made_with, dict) else {},
    )


def _one_objective(values: Mapping[str, Any], argv: list[str]) -> dict[str, Any]:
    """Returns the file's flags without its --mode and --loss if ``argv`` has one of the two."""
    chosen = any(token.partition("=")[0] in ("--mode", "--loss") for token in argv)
    return {
        name: value for name, value in values.items() if not (chosen and name in ("mode", "loss"))
    }


def _without_code(name: str, values: Mapping[str, Any], rest: list[str]) -> list[str]:
    """Returns the whole command line. Raises UserError if the file lets code of others run.

    A file may come from somebody else. Its values become words of a command line, so every word is
    looked at.
    """
    tokens = not_given(values, rest)
    for token, value in itertools.zip_longest(tokens, tokens[1:]):
        flag = token.partition("=")[0].removeprefix("--").replace("-", "_")
        given, harmless = CODE.get(flag, ("", ()))
        if token.startswith("--") and given and value not in harmless:
            raise UserError(
                f"--config {name}: its --{flag} runs code of others, which a file may not ask for; "
                f"read that code, then give {given} on the command line"
            )
    return tokens + rest


def not_given(values: Mapping[str, Any], argv: list[str]) -> list[str]:
    """Returns the tokens of the flags in ``values`` that ``argv`` does not have."""
    given = {
        token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")
    }
    return [
        text
        for flag, value in values.items()
        if str(flag).replace("-", "_") not in given
        for text in _tokens(str(flag), value)
    ]


def _check_flags(file: str, values: Mapping[Any, Any]) -> None:
    """Raises UserError for a name or a value that would become another flag.

    A value is text of a stranger's file, and a command line tells flags from values by their form.
    """
    seen: set[str] = set()
    for flag, value in values.items():
        name = str(flag).replace("-", "_")
        if not NAME.fullmatch(name) or name in ("help", "help_all", "config"):
            raise UserError(f"--config {file}: {flag!r} is not the name of a flag")
        if name in seen:
            raise UserError(f"--config {file}: {flag} stands twice; write it once")
        seen.add(name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and OPTION.match(each):
                raise UserError(
                    f"--config {file}: {flag} has the value {each}, which looks like a flag; "
                    "give each flag a line of its own"
                )
            if isinstance(value, list) and isinstance(each, list | dict):
                raise UserError(f"--config {file}: {flag} has a list in a list; wanted words")


def _tokens(flag: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    if value is False and flag.replace("-", "_").endswith("_strategy"):
        value = "no"  # YAML 1.1 reads the word no as False
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
