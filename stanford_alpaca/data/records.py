"""Turns a raw value from a file into a record of one form: the columns of ``FORMS``.

==========  ==================================  ====================================================
form        columns                             notes
==========  ==================================  ====================================================
alpaca      instruction, input, output, system  ``input`` and ``system`` may be absent; ``history``
completion  prompt, completion                  two strings; two lists of messages are a ``chat``
chat        messages: [{role, content}]         ShareGPT: conversations: [{from, value}]
text        text                                a text file: a document (see ``documents``)
==========  ==================================  ====================================================
"""

from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from stanford_alpaca.data.messages import (
    MEND,
    NOTHING,
    Messages,
    check_text,
    json_name,
    more_of,
    pack,
    parsed,
    read_messages,
    read_tools,
    read_weight,
)
from stanford_alpaca.errors import UserError, listed

TEXT = Value("string")
# ``more`` is JSON (see ``more_of``) with weight, tools, history and unused. The last holds the
# names of fields that were not read.
FORMS = {
    "chat": Features(
        {"messages": List({"role": TEXT, "content": TEXT, "more": TEXT}), "more": TEXT}
    ),
    "alpaca": Features(
        {"instruction": TEXT, "input": TEXT, "output": TEXT, "system": TEXT, "more": TEXT}
    ),
    "completion": Features({"prompt": TEXT, "completion": TEXT, "more": TEXT}),
    "text": Features({"text": TEXT, "more": TEXT}),
}

FORM_COLUMNS = {  # the columns that decide a form
    "chat": ("messages", "conversations"),
    "alpaca": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
OTHER_NAMES = {  # our column -> its names in published data, for hints
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat", "data"),
    "instruction": ("question", "query", "problem"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "target", "solution", "answers"),
    "completion": ("response", "answer", "output", "target", "chosen"),
    "text": ("content", "document", "body", "chosen"),
}
Record = dict  # the columns of one form


def form_of(columns: list[str] | Record) -> str:
    """Returns the name of the form of a record or of the columns of a table.

    It is the form whose first column is among ``columns``, as ``parse_record`` returned them.
    """
    return next(name for name, features in FORMS.items() if next(iter(features)) in columns)


def parse_record(
    value: object,
    where: str,
    columns: Mapping[str, str] | None = None,
    needs_output: bool = True,
    train_history: bool = False,
) -> Record:
    """Turns a raw value into a record of the form that it has.

    Args:
        where: the place of the value, for error messages.
        columns: our names -> the names in the data.
        needs_output: whether the record needs a response. For generation it does not.
        train_history: whether the answers of an Alpaca record's ``history`` are trained too.

    Raises:
        UserError: something is wrong with the value.
    """
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: {json_name(value)}, wanted an object with instruction and output; {MEND}"
        )
    for sense in ("images", "videos", "audios"):
        if isinstance(value.get(sense), list) and value[sense]:
            raise UserError(
                f"{where}: has {sense}, and text alone is trained; take the field or the record out"
            )
    columns = columns or {}
    record = _renamed(value, columns)
    unused: dict[str, None] = {}
    weight, read = read_weight(record, where)
    more: dict[str, Any] = {} if weight == 1 else {"weight": weight}
    name = next((name for name in FORM_COLUMNS["chat"] if record.get(name) not in (None, "")), None)
    system = record.get("system")
    if name is not None:
        row: Record = {
            "messages": read_messages(record[name], f"{where}: {name!r}", columns, system, unused)
        }
        read |= {name, "system", "tools"}
    elif isinstance(record.get("prompt"), list | dict):
        row = {"messages": _in_two_parts(record, where, columns, unused)}
        read |= {"prompt", "completion", "system", "tools"}
    else:
        needed, optional = _fields_of(record)
        if not needs_output:
            needed, optional = needed[:1], [*needed[1:], *optional]
        row = _strings(record, needed, optional, where)
        read |= row.keys()
        if "instruction" in row:
            more["history"] = _history(record.get("history"), f"{where}: 'history'", train_history)
            read |= {"history", "tools"}
    if "tools" in read and record.get("tools"):
        more["tools"] = read_tools(record["tools"], f"{where}: 'tools'")
    unused |= dict.fromkeys(_not_read(value, read, columns))
    packed = pack(more | {"unused": sorted(unused)})
    check_text(packed, f"{where}: one of its fields")
    return row | {"more": packed}


def _fields_of(record: Record) -> tuple[list[str], list[str]]:
    """Returns the needed and the optional columns for the form of a record without messages."""
    if record.get("instruction") is None and record.get("prompt") is not None:
        return ["prompt", "completion"], []
    if record.get("instruction") is None and record.get("output") is None and "text" in record:
        return ["text"], []
    if "instruction" not in record and "prompt" in record:
        return ["prompt", "completion"], []
    return ["instruction", "output"], ["input", "system"]


def _in_two_parts(
    record: Record, where: str, columns: Mapping[str, str], unused: dict[str, None]
) -> Messages:
    """Joins a prompt and a completion that are lists of messages.

    The assistant's turns in the prompt are context and not trained.
    """
    answer = record.get("completion") or []
    before = read_messages(
        record["prompt"], f"{where}: 'prompt'", columns, record.get("system"), unused
    )
    for message in before:
        if message["role"] == "assistant":
            message["more"] = pack(more_of(message) | {"weight": 0})
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return before + (
        read_messages(answer, f"{where}: 'completion'", columns, None, unused) if answer else []
    )


def _history(value: object, where: str, trained: bool) -> Messages:
    """Returns earlier questions and answers as messages. Unless ``trained``, they are context."""
    pairs = parsed(value, where, "a list of pairs") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise UserError(f"{where} is no list of pairs of a question and its answer; {MEND}")
    weight = pack({} if trained else {"weight": 0})
    found = [
        {"role": role, "content": text, "more": weight if role == "assistant" else ""}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    for number, message in enumerate(found):
        check_text(message["content"], f"{where}, pair {number // 2 + 1}")
    return found


def _not_read(value: Record, read: set[str], columns: Mapping[str, str]) -> list[str]:
    """Returns the fields of a record that say something and were not read."""
    taken = {columns[name] if columns.get(name) in value else name for name in read}
    return [str(name) for name, item in value.items() if name not in taken and item not in NOTHING]


def unused_fields(records: Dataset, also: str = "") -> dict[str, int]:
    """Counts the records that have each field that was not read.

    Args:
        also: a field that was read but that the caller does not use, to be counted too.
    """
    counts: Counter[str] = Counter()
    if "more" not in records.column_names:
        return {}
    for row in pc.value_counts(records.with_format("arrow")[:]["more"]):
        more = more_of({"more": row["values"].as_py()})
        names = [*more.get("unused", ()), *([also] if also in more else [])]
        counts.update(dict.fromkeys(names, row["counts"].as_py()))
    return dict(counts.most_common())


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """Gives a record our names for its columns.

    If --columns names columns of some forms, these decide the form, and the columns of the other
    forms are left out.
    """
    named = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    chosen = [own for own in FORM_COLUMNS.values() if named.keys() & own]
    others = {name for own in FORM_COLUMNS.values() if chosen and own not in chosen for name in own}
    return {name: value for name, value in (record | named).items() if name not in others}


def _strings(record: Record, needed: list[str], optional: list[str], where: str) -> Record:
    for name in needed:
        if name not in record:
            has = listed(record) or "none"
            raise UserError(
                f"{where}: no field {name!r}; it has {has} ({_hint(record, needed, optional)})"
            )
    row = {name: record[name] for name in needed}
    row |= {name: "" if record.get(name) is None else record[name] for name in optional}
    for name, text in row.items():
        check_text(text, f"{where}: {name!r}")
    return row


def _hint(record: Record, needed: list[str], optional: list[str]) -> str:
    """Returns what to do about a record without a needed field.

    If the record has fields of a known name, the hint is a --columns that works.
    """
    lists = [
        name
        for name, value in record.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if lists and {"content", "value"} & {
        key for message in record[lists[0]] if isinstance(message, dict) for key in message
    }:
        return f"--columns messages={lists[0]}"
    said = next(
        (
            name
            for name in OTHER_NAMES["messages"]
            if str(record.get(name)).lstrip().startswith("[{")
        ),
        None,
    )
    if not lists and said:
        return f"--columns messages={said}"
    if lists:
        return f"is it a file of records under {lists[0]!r}? write that list alone"
    known = {
        ours: theirs
        for ours in (*needed, *optional)
        if ours not in record
        for theirs in OTHER_NAMES.get(ours, ())
        if isinstance(record.get(theirs), str)
    }
    if all(name in record or name in known for name in needed):
        return "--columns " + " ".join(f"{ours}={theirs}" for ours, theirs in known.items())
    missing = next(name for name in needed if name not in record)
    near = get_close_matches(missing, map(str, record), 1)
    if near:
        return f"--columns {missing}={near[0]}"
    text = next((name for name in OTHER_NAMES["text"] if isinstance(record.get(name), str)), "NAME")
    return f"another name? --columns {missing}=NAME" + (
        f", or text={text}" if missing == "instruction" else ""
    )
