"""Classification tasks.

A task's template and classes come from ``templates/TASK.yaml``, its texts and labels from files or
the hub.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from datasets import load_dataset

from stanford_alpaca.checkpoint.bounded import read_yaml
from stanford_alpaca.console import quiet_hub
from stanford_alpaca.data.messages import check_text
from stanford_alpaca.data.reading import Placed, read_file
from stanford_alpaca.errors import UserError, first_line, nearest

TASK_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Task:
    """A task as its file in ``templates/`` says. A label is the number of its class, from 0 on."""

    name: str
    template: str  # with {text} and {label}
    classes: list[str]  # the words that stand for the labels
    hub: str | None = None  # a data set on the hub, with its config and revision
    config: str | None = None
    revision: str | None = None
    train: str = "train"  # names of its splits
    test: str = "test"
    text: str = "text"  # names of its columns
    label: str = "label"

    def write(self, text: str, label: int) -> str:
        """Returns a text with its class in words."""
        return self.template.format(text=text, label=self.classes[label])


class Split(NamedTuple):
    """Records as columns."""

    texts: list[str]
    labels: list[int]


class TaskData(NamedTuple):
    """A task with its records."""

    task: Task
    train: Split
    test: Split

    def described(self) -> dict[str, Any]:
        """Returns what the results say about the task."""
        about = {"template": self.task.template, "classes": self.task.classes}
        return about | {
            name: {"records": len(split.texts), "sha256": split_digest(split)}
            for name, split in self._asdict().items()
            if isinstance(split, Split)
        }


def split_digest(split: Split) -> str:
    """Returns a SHA-256 over texts and labels."""
    return sha256(repr(list(zip(*split, strict=True))).encode()).hexdigest()


def read_tasks(own: Path | None = None) -> dict[str, Task]:
    """Reads all tasks by name.

    They are the package's own and those of the user's folder ``own``, which win.

    Raises:
        UserError: the folder does not exist, or a file is bad.
    """
    if own is not None and not own.is_dir():
        raise UserError(f"--templates {own}: no such folder; give one with a YAML file per task")
    files = [
        *sorted(TASK_TEMPLATES.glob("*.yaml")),
        *(sorted(own.glob("*.yaml")) if own is not None else []),
    ]
    return {file.stem: _read_task(file) for file in files}


def _read_task(file: Path) -> Task:
    known = [field.name for field in fields(Task) if field.name != "name"]
    try:
        values = read_yaml(file)
        places = {
            f"{name}{spec}{kind or ''}"
            for _, name, spec, kind in Formatter().parse(values["template"])
            if name is not None
        }
        classes = values["classes"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file}: no task ({first_line(error)}); give template and classes"
        ) from None
    for name in values:
        if name not in known:
            raise UserError(
                f"{file}: unknown field {name}{nearest(str(name), known)}; "
                f"known are {', '.join(known)}"
            )
    if places != {"text", "label"}:
        raise UserError(
            f"{file}: the template needs {{text}} and {{label}} and nothing else in braces"
        )
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(
            f"{file}: classes is {classes!r}; wanted a list of words, "
            "in quotes where YAML reads them as something else"
        )
    if (
        len(classes) < 2
        or any(a != b and b.startswith(a) for a in classes for b in classes)
        or len({*classes}) < len(classes)
    ):
        raise UserError(
            f"{file}: give two classes or more, none of which begins with another's name"
        )
    return Task(**values | {"name": file.stem, "classes": classes})


def choose_tasks(asked: str | None, known: dict[str, Task], folder: Path | None) -> list[Task]:
    """Returns the tasks of these names, which are separated by commas.

    By default it returns those that the folder has files of, or without a folder all that the hub
    has.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"--data_dir {folder}: no such folder; "
            "give one with TASK_train.jsonl and TASK_test.jsonl"
        )
    names = None if asked is None else [name.strip() for name in asked.strip("()[]").split(",")]
    if names is None and folder is not None:
        names = [name for name in known if all(file.is_file() for file in task_files(folder, name))]
        if not names:
            raise UserError(
                f"--data_dir {folder}: no TASK_train.jsonl with TASK_test.jsonl; "
                f"tasks are {', '.join(known)}"
            )
    for name in names or []:
        if name not in known:
            raise UserError(
                f"--tasks {name}: no such task{nearest(name, list(known))}; "
                f"choose from {', '.join(known)}"
            )
    return (
        [known[name] for name in dict.fromkeys(names)]
        if names
        else [task for task in known.values() if task.hub]
    )


def task_files(folder: Path, name: str) -> tuple[Path, Path]:
    """Returns a task's train and test files in a folder."""
    return folder / f"{name}_train.jsonl", folder / f"{name}_test.jsonl"


def load_task(task: Task, folder: Path | None = None, limit: int | None = None) -> TaskData:
    """Loads the records from a folder or the hub, and of the test set only the first ``limit``.

    Raises:
        UserError: no files, no network, an empty file, a record without text, or a label of no
            class.
    """
    if folder is None:
        train, test = (_from_hub(task, split) for split in (task.train, task.test))
    else:
        for file in task_files(folder, task.name):
            if not file.is_file():
                raise UserError(f"{file}: no such file; task {task.name} needs it in --data_dir")
        train, test = (
            checked(task, read_file(file), str(file)) for file in task_files(folder, task.name)
        )
    return TaskData(task, train, Split(test.texts[:limit], test.labels[:limit]))


def _from_hub(task: Task, split: str) -> Split:
    advice = f"give files: --data_dir DIR with {task.name}_train.jsonl and {task.name}_test.jsonl"
    if task.hub is None:
        raise UserError(f"task {task.name} names no set on the hub; {advice}")
    try:
        with quiet_hub():
            data = load_dataset(task.hub, task.config, revision=task.revision, split=split)
        rows = data.select_columns([task.text, task.label]).to_list()
    except Exception as error:  # the hub raises many kinds of errors: not found, no network, gated
        raise UserError(
            f"{task.hub}: the hub did not give it ({first_line(error)}); {advice}"
        ) from None
    named = ({"text": row[task.text], "label": row[task.label]} for row in rows)
    return checked(
        task,
        ((f"{task.hub}, {split}:record {number}", row) for number, row in enumerate(named, 1)),
        task.hub,
    )


def checked(task: Task, values: Iterable[Placed], source: str) -> Split:
    """Returns the texts and labels of records.

    Raises:
        UserError: a record is bad (the first one is named), or there is none.
    """
    texts, labels = [], []
    for where, value in values:
        text, label = (
            (value.get("text"), value.get("label")) if isinstance(value, dict) else (None, None)
        )
        if not isinstance(text, str):
            raise UserError(f'{where}: no text; wanted {{"text": "...", "label": 0}}')
        check_text(text, where)
        if type(label) is not int or not 0 <= label < len(task.classes):
            classes = ", ".join(f"{number} {name}" for number, name in enumerate(task.classes))
            raise UserError(f"{where}: label {label!r} is no class of task {task.name}: {classes}")
        texts.append(text)
        labels.append(label)
    if not texts:
        raise UserError(f"{source}: there is no record in it; give a file with at least one")
    return Split(texts, labels)
