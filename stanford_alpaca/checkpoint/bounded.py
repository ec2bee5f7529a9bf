"""Reads small files of strangers: settings, records and lists, never more than they may hold.

Every error is an OSError or a ValueError whose first line says what is wrong.
"""

import json
import os
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

LOADED = {".json", ".safetensors", ".model", ".txt", ".jinja", ".py", ".bin", ".pt", ".gguf"}
JSON_BYTES = 2**28
YAML_BYTES = 2**20  # PyYAML reads about 100 KB a second
YAML_VALUES = 10**5  # with what aliases repeat
DEEP = "nested too deep"


def read_text(file: Path, most: int = JSON_BYTES, encoding: str = "utf-8") -> str:
    """Returns the text of a regular file of at most ``most`` bytes. A pipe is not waited for."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no file, but a folder, a pipe or a device")
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return content.decode(encoding)


def strange_file(folder: Path) -> str:
    """Says which file of a model's folder a loader would wait for or could not read, or nothing."""
    for file in sorted(each for each in folder.iterdir() if each.suffix in LOADED):
        if not file.is_file():
            return f"{file}: a folder, a pipe, a device or a link that leads nowhere"
        if not os.access(file, os.R_OK):
            return f"{file}: cannot be read (Permission denied)"
    return ""


def read_json(file: Path) -> Any:
    """Returns what a JSON file holds."""
    try:
        return json.loads(read_text(file))
    except RecursionError:
        raise ValueError(DEEP) from None


def read_yaml(file: Path) -> Any:
    """Returns what a YAML file holds. A key that stands twice is an error, and so is ``<<``.

    Aliases may repeat values, but of all values that then stand there no more than YAML_VALUES.
    """
    try:
        value = yaml.load(read_text(file, YAML_BYTES), _Loader)
        if not _is_small(value):
            raise ValueError(f"its aliases stand for more than {YAML_VALUES:,} values")
        return value
    except RecursionError:
        raise ValueError(DEEP) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ValueError(f"{getattr(error, 'problem', None) or error}{place}") from None


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)
        seen: set[Hashable] = set()
        for name, _ in node.value:
            key = self.construct_object(name, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice", problem_mark=name.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for name, _ in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem="<< is not read, write the values out", problem_mark=name.start_mark
                )


def _is_small(value: Any) -> bool:
    """Returns whether a value has at most YAML_VALUES parts, repeated ones counted again."""
    rest, count = [value], 0
    while rest:
        part = rest.pop()
        count += 1
        if isinstance(part, dict):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set):
            rest += part
        if count + len(rest) > YAML_VALUES:
            return False
    return True
