"""The command ``emo``: each of its words is a module that ``python -m`` runs too.

Only the module that is asked for is imported. ``--help`` is read from the module's source, so it
answers without importing torch.
"""

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from stanford_alpaca import __version__
from stanford_alpaca.console import show
from stanford_alpaca.errors import UserError, nearest
from stanford_alpaca.flags import end_at_once_on_sigint, exit_on_user_error


class Command(NamedTuple):
    """A word of ``emo``."""

    module: str  # below stanford_alpaca
    about: str
    more: tuple[str, ...] = ()  # arguments that the word stands for


COMMANDS = {
    "train": Command("train", "fine-tune a model"),
    "continual": Command("continual", "fine-tune on running text, by the published recipe"),
    "generate": Command("generate", "answer prompts with checkpoints"),
    "chat": Command("generate", "type instructions, see the answers", ("--interactive",)),
    "preview": Command("preview", "show what training will see of your data"),
    "preflight": Command("preflight.__main__", "estimate memory and time of every engine"),
    "merge": Command("merge_lora", "add an adapter to its base"),
    "measure": Command("evaluation.metrics", "measure and compare checkpoints"),
    "compare": Command("bench.__main__", "compare losses, one of your own among them"),
    "report": Command("evaluation.report", "write a page about runs"),
    "icl": Command("evaluation.icl", "few-shot evaluation"),
    "checkpoint": Command("checkpoint.__main__", "verify, list and export checkpoints"),
    "cost": Command("cost.__main__", "make a cost embedding, or look into one"),
    "fetch": Command("data.fetch", "download a published instruction set"),
    "launch": Command("launch", "torchrun with a clean end"),
}
CHOOSES = ("train", "continual")  # processes, engine, precision and resuming, as the launchers do
HELP = ("-h", "--help", "help")


def usage() -> str:
    """Returns what ``emo --help`` prints."""
    rows = "\n".join(f"  {name:<12}{command.about}" for name, command in COMMANDS.items())
    return (
        f"Supervised fine-tuning with EMO, version {__version__}.\n\n"
        f"usage: emo COMMAND [ARGUMENTS]\n\n{rows}\n\n"
        "emo COMMAND --help says what a command takes."
    )


def main() -> None:
    """Runs ``emo``."""
    exit_on_user_error(lambda: run(sys.argv[1:]))


def run(argv: list[str]) -> None:
    """Runs a command of ``emo``. Raises UserError for one that there is not."""
    if not argv or argv[0] in HELP:
        show(usage())
        return
    if argv[0] == "--version":
        show(__version__)
        return
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        known = nearest(name, list(COMMANDS))
        raise UserError(f"emo {name}: no such command{known}; emo --help lists them")
    command = COMMANDS[name]
    if rest and rest[0] in HELP[:2] and (text := help_of(name)):
        show(text)
        return
    if name in CHOOSES and "RANK" not in os.environ and not {*HELP, "--help-all"} & {*rest}:
        from stanford_alpaca.run import launcher

        launcher.run(f"stanford_alpaca.{command.module}", rest, reported=name == "train")
    sys.argv = [f"emo {name}", *rest, *command.more]
    end_at_once_on_sigint()
    importlib.import_module(f"stanford_alpaca.{command.module}").main()


def help_of(name: str) -> str:
    """Returns the docstring of the ``Options`` of a command, read from its source, or nothing."""
    module = COMMANDS[name].module
    file = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            said = ast.get_docstring(node) or ""
            package = module.removesuffix(".__main__")
            return said.replace(f"python -m stanford_alpaca.{package}", f"emo {name}")
    return ""


if __name__ == "__main__":
    main()
