"""Data files and command lines that are nearly right, drawn by seed.

A run reads each of them, and ends before it would load a model.
"""

import csv
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import fields
from io import BytesIO, StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import HfArgumentParser
from transformers import TrainingArguments as HfTrainingArguments

from stanford_alpaca.errors import UserError
from stanford_alpaca.generation.prompts import read_prompts
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.run.arguments import FLAGS as CLASSES
from stanford_alpaca.run.arguments import TrainingArguments
from stanford_alpaca.run.data import load_data
from stanford_alpaca.run.flag_checks import check
from stanford_alpaca.run.model_checks import check_fit
from stanford_alpaca.run.parse import parse

BASE = Path(__file__).resolve().parents[2] / "data" / "tiny-base"
LIMIT = 20  # seconds for one case
WORDS = [
    "",
    " ",
    "a b",
    "é\u2028",
    "\ud800",
    "\x00",
    "</s>",
    "\ufeff",
    "{}",
    "nan",
    "0",
    "-1",
    "1e400",
    "null",
    "x" * 3000,
    "~nosuchuser/x",
    "\x1b[2J",
]
VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    10**400,
    "text",
    "",
    [],
    {},
    ["a"],
    [[]],
    [None],
    {"a": {"b": []}},
    "\ud800",
    "\uffff</s>",
]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
RECORDS: list[dict] = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"prompt": "a", "completion": "b"},
    {"messages": CHAT},
    {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "system": "s",
    },
    {"text": "a b c"},
]


class Hang(BaseException):
    """There was no outcome in time.

    This is not an Exception, because the code under test might turn one into an error line.
    """


def outcome(case: Callable[[], object], limit: int = LIMIT) -> str:
    """Runs a case and returns ``ok`` or ``refused``. Any other exception of the case is raised.

    Raises:
        Hang: if there is no outcome in time.
        AssertionError: for a refusal without a clear line.
    """
    printed = StringIO()
    try:
        with _alarm(limit), redirect_stdout(printed), redirect_stderr(printed):
            case()
    except UserError as error:
        line = " ".join(str(error).split())
        assert line and "Traceback" not in printed.getvalue() + line, line
        return "refused"
    except SystemExit as end:  # --help
        assert end.code == 0, end.code
    return "ok"


def check_file(file: Path) -> Callable[[], object]:
    """Returns a case that reads a data file as a run does, until its examples are there.

    A ``.txt`` file is read as a file of prompts.
    """

    def case() -> None:
        read_prompts(str(file), None, None) if file.suffix == ".txt" else check_command(
            plain_argv(file)
        )()

    return case


def check_command(argv: list[str]) -> Callable[[], object]:
    """Returns a case that does all that a run does before it loads a model."""

    def case() -> None:
        run = parse(argv)
        check(run)
        args = run.training
        prompts = (
            read_prompts(args.sample_prompts, None, None) if args.sample_prompts is not None else []
        )
        name, may_grow = run.model.model_name_or_path, not run.lora.lora
        tokenizer = ModelSource(name, cache_dir=args.cache_dir).tokenizer(
            args.model_max_length, may_grow=may_grow
        )
        check_fit(run, tokenizer, prompts)
        load_data(run.data, args, tokenizer)

    return case


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"no outcome within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    environment = dict(os.environ)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.environ.clear()
        os.environ.update(environment)  # transformers' arguments set variables


# ---- data ----------------------------------------------------------------------------------------


def fuzz_json(seed: int, folder: Path) -> Path:
    """Writes a data file with up to four mutations of its values and bytes."""
    rng = random.Random(seed)
    form = rng.choice(RECORDS)
    records: list = [json.loads(json.dumps(form)) for _ in range(rng.randint(1, 5))]
    for _ in range(rng.choice([0, 1, 1, 2])):
        _mutate_value(rng, records)
    suffix = rng.choice([".json", ".json", ".jsonl", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"])
    content = _written(rng, records, suffix)
    for _ in range(rng.choice([0, 0, 1, 2])):
        content = rng.choice(BYTES)(rng, content)
    file = folder / f"{seed}{suffix}"
    file.write_bytes(content)
    return file


def _written(rng: random.Random, records: list, suffix: str) -> bytes:
    """Returns the records in a file format, as far as it can hold them, in some encoding."""
    if suffix == ".parquet":
        buffer = BytesIO()
        with suppress(Exception):  # values that no table can hold
            pq.write_table(pa.Table.from_pylist(records), buffer)
        return buffer.getvalue()
    ascii_only = rng.random() < 0.7
    if suffix in (".csv", ".tsv"):
        table = StringIO()
        columns = list(records[0]) if isinstance(records[0], dict) else ["text"]
        writer = csv.DictWriter(
            table, columns, extrasaction="ignore", delimiter="," if suffix == ".csv" else "\t"
        )
        writer.writeheader()
        writer.writerows(record for record in records if isinstance(record, dict))
        text = table.getvalue()
    elif rng.random() < 0.5:
        text = json.dumps(records, indent=rng.choice([None, None, 2]), ensure_ascii=ascii_only)
    else:
        text = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    encoding = rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32-be", "latin-1"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def _mutate_value(rng: random.Random, records: list) -> None:
    """Changes one place of the records: the value, a dropped or renamed key, or deep nesting."""
    place: object = records
    while rng.random() < 0.75:
        inner = (
            list(place.values())
            if isinstance(place, dict)
            else place
            if isinstance(place, list)
            else []
        )
        below = [value for value in inner if isinstance(value, list | dict) and value]
        if not below:
            break
        place = rng.choice(below)
    value = deepcopy(rng.choice(VALUES))
    if rng.random() < 0.1:
        for _ in range(rng.choice([10, 500, 900])):
            value = [value] if rng.random() < 0.5 else {"a": value}
    if isinstance(place, list) and place:
        place[rng.randrange(len(place))] = value
    elif isinstance(place, dict) and place:
        key = rng.choice(list(place))
        if rng.random() < 0.3:
            place.pop(key)
        elif rng.random() < 0.4:
            place[rng.choice([*WORDS, key.upper()])] = place.pop(key)
        else:
            place[key] = value


def _flip(rng: random.Random, content: bytes) -> bytes:
    array = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if array:
            array[rng.randrange(len(array))] ^= 1 << rng.randrange(8)
    return bytes(array)


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randint(0, len(content))]


def _insert(rng: random.Random, content: bytes) -> bytes:
    piece = rng.choice(
        [
            b"\x00",
            b"\xff",
            b"\xed\xa0\x80",
            b"\xef\xbb\xbf",
            b",",
            b"]",
            b"}",
            b'"',
            b"\\",
            b"\\u",
            b"\r",
            b"\n\n",
            b"NaN",
            b"[" * 5000,
        ]
    )
    place = rng.randint(0, len(content))
    return content[:place] + piece * rng.randint(1, 3) + content[place:]


def _double(rng: random.Random, content: bytes) -> bytes:
    """Doubles a piece of the content, so that keys or records stand there twice."""
    start = rng.randint(0, len(content))
    end = rng.randint(start, len(content))
    return content[:end] + content[start:end] + content[end:]


BYTES: list[Callable[[random.Random, bytes], bytes]] = [_flip, _truncate, _insert, _double]


# ---- command lines -------------------------------------------------------------------------------

OWN = tuple(cls for cls in CLASSES if cls is not TrainingArguments)
ACTIONS = {action.dest: action for action in HfArgumentParser(CLASSES)._actions}
FLAGS = sorted({field.name for cls in CLASSES for field in fields(cls)})
FEW = sorted(
    {field.name for cls in OWN for field in fields(cls)}
    | {field.name for field in fields(TrainingArguments)}
    - {field.name for field in fields(HfTrainingArguments)}
)
GOOD = ["1", "2", "4", "0.5", "True", "False", "emo", "mle", "linear"]
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "3.5",
    "1e-9",
    "1e400",
    "-1e400",
    "nan",
    "inf",
    "9" * 30,
    "4294967296",
    "1e308",
    "0x10",
    "1_000",
    "0.5",
]
TEXTS = [
    "True",
    "False",
    "no",
    "steps",
    "epoch",
    "best",
    "auto",
    "[]",
    "{}",
    '{"a": 1}',
    "[1",
    "a=b",
    "--",
    "-x",
    "none",
    "=",
    "../..",
]
# Flags that reach beyond the case: to files, the network, a debugger, or other processes.
NEVER = {
    "output_dir",
    "cache_dir",
    "push_to_hub",
    "hub_model_id",
    "deepspeed",
    "ddp_backend",
    "preprocessing_num_workers",
    "project",
}


def plain_argv(data: Path) -> list[str]:
    """Returns a valid command line."""
    values = {
        "model_name_or_path": BASE,
        "data_path": data,
        "output_dir": data.parent / "out",
        "cache_dir": data.parent / "cache",
        "mode": "emo",
        "max_steps": 3,
        "global_batch": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "preprocessing_num_workers": 1,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def fuzz_argv(seed: int, folder: Path) -> list[str]:
    """Returns a command line with one to three mutations.

    Its data file, which is valid, and its ``--config`` file are written into the folder.
    """
    rng = random.Random(seed)
    data = folder / "valid.json"
    if not data.exists():
        data.write_text(json.dumps([RECORDS[0]] * 8))
    argv = plain_argv(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        argv = rng.choice(MUTATIONS)(rng, argv)
    if rng.random() < 0.15:
        file = folder / f"{seed}.yaml"
        file.write_text(
            "\n".join(
                f"{name}: {_value(rng, name)}"
                for name in [_name(rng) for _ in range(rng.randint(0, 4))]
            ),
            errors="replace",
        )
        argv += ["--config", str(file)]
    return argv


def _name(rng: random.Random) -> str:
    return rng.choice(
        [name for name in (FEW if rng.random() < 0.5 else FLAGS) if name not in NEVER]
    )


def _value(rng: random.Random, name: str = "") -> str:
    """Returns a value for a flag, more often than not one of its type."""
    action = ACTIONS.get(name)
    if action is not None and rng.random() < 0.7:
        if action.choices:
            return str(rng.choice(list(action.choices)))
        if action.type in (int, float):
            return rng.choice(
                ["1", "2", "4", "100"] if action.type is int else ["1e-5", "0.5", "2.0", "1"]
            )
        if action.type is not str and action.type is not None:
            return rng.choice(["True", "False"])
    return rng.choice(rng.choice([GOOD, GOOD, NUMBERS, TEXTS, WORDS]))


def _change(rng: random.Random, argv: list[str]) -> list[str]:
    """Changes the value of a flag that is there, unless the flag is in ``NEVER``."""
    places = [i for i in range(1, len(argv), 2) if argv[i - 1][2:] not in NEVER]
    place = rng.choice(places)
    return [*argv[:place], _value(rng, argv[place - 1][2:]), *argv[place + 1 :]]


def _add(rng: random.Random, argv: list[str]) -> list[str]:
    name = _name(rng)
    return [
        *argv,
        f"--{name}",
        *(_value(rng, name) for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2]))),
    ]


def _joined(rng: random.Random, argv: list[str]) -> list[str]:
    name = _name(rng)
    return [*argv, f"--{name}={_value(rng, name)}"]


def _mistype(rng: random.Random, argv: list[str]) -> list[str]:
    name = _name(rng)
    place = rng.randrange(len(name))
    return [*argv, f"--{name[:place]}{name[place + 1 :]}", _value(rng)]


def _drop(rng: random.Random, argv: list[str]) -> list[str]:
    place = rng.randrange(len(argv))
    kept = argv[place] if place % 2 == 0 else argv[place - 1]
    return argv if kept[2:] in NEVER else argv[:place] + argv[place + 1 :]


def _stray(rng: random.Random, argv: list[str]) -> list[str]:
    """Inserts a stray word between two flags."""
    place = 2 * rng.randrange(len(argv) // 2)
    return [*argv[:place], _value(rng), *argv[place:]]


MUTATIONS: list[Callable[[random.Random, list[str]], list[str]]]
MUTATIONS = [_change, _change, _add, _add, _add, _joined, _joined, _mistype, _drop, _stray]
