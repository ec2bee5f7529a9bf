"""From a file, a folder or a hub name to records of one form: ``datasets.Dataset`` with the columns of ``FORMS``.

==========  ============================================== =====================================================
form        columns                                        also written as
==========  ============================================== =====================================================
alpaca      instruction, input, output, system             ``input`` and ``system`` may be absent
completion  prompt, completion                             two strings; two lists of messages are a ``chat``
chat        messages: [{role, content}]                    ShareGPT: conversations: [{from, value}]
text        text                                           a text file: a document (see ``documents``)
==========  ============================================== =====================================================
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from stanford_alpaca.data.documents import Texts
from stanford_alpaca.data.reading import (
    FILE_KINDS,
    TEXT_FILE,
    Placed,
    digest_of,
    exists,
    kind_of_file,
    list_files,
    read_file,
)
from stanford_alpaca.errors import UserError, first_line, nearest, quiet_hub

ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
TEXT = Value("string")
FORMS = {
    "chat": Features({"messages": List({"role": TEXT, "content": TEXT})}),
    "alpaca": Features({"instruction": TEXT, "input": TEXT, "output": TEXT, "system": TEXT}),
    "completion": Features({"prompt": TEXT, "completion": TEXT}),
    "text": Features({"text": TEXT}),
}

OWN = {  # the columns that decide a form
    "chat": ("messages", "conversations"),
    "alpaca": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
VERSION = 3  # raise it when the same file would give other records, so that old caches are not used

MEND = "mend the record or take it out"
KINDS = {  # what JSON calls a value
    "bool": "true or false", "NoneType": "null", "int": "a number", "float": "a number", "str": "a string", "list": "a list",
    "dict": "an object",
}  # fmt: skip

Record = dict  # of one of the forms: its columns, without those of the others


def form_of(columns: list[str] | Record) -> str:
    """The name of the form whose first column is among these, as ``canonical`` returns them."""
    return next(name for name, features in FORMS.items() if next(iter(features)) in columns)


def parse_columns(texts: list[str]) -> dict[str, str]:
    """--columns, texts like ``instruction=question`` (or several with commas), as a mapping from our names to the data's."""
    pairs = [part.partition("=") for text in texts for part in text.split(",")]
    known = [*dict.fromkeys(name for features in FORMS.values() for name in features), "conversations", "role", "content"]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise UserError(f"--columns {ours}{equals}{theirs}: write OURS=THEIRS, as instruction=question")
        if ours not in known:
            raise UserError(f"--columns {ours}={theirs}: {ours} is no column of ours{nearest(ours, known)}")
    return {ours: theirs for ours, _, theirs in pairs}


def take_columns(flag: str | None, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """--columns of a command whose parser gives it the first value only, and the words without its other values."""
    if flag is None:
        return {}, words
    others = [word for word in words if "=" in word and not exists(Path(word))]
    return parse_columns([flag, *others]), [word for word in words if word not in others]


def check_columns(paths: list[str], columns: Mapping[str, str]) -> None:
    """Raises UserError for a name in --columns that the first record of no source has; hub sets are not asked."""
    sources = [local_files(path) for path in paths] if columns else []
    if not sources or None in sources:
        return
    seen: dict[str, None] = {}
    for files in sources:
        _, first = next(read_file(files[0]), ("", None))  # type: ignore[index]
        for record in [first, *(v[0] for v in first.values() if isinstance(v, list) and v)] if isinstance(first, dict) else []:
            seen |= dict.fromkeys(record if isinstance(record, dict) else ())
    for ours, theirs in columns.items():
        if theirs not in seen:
            raise UserError(f"--columns {ours}={theirs}: there is no {theirs!r}; the first record has {', '.join(seen)}")


def load_records(
    path: str | Path,
    cache_dir: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,  # our name -> the name in the file
    streaming: bool = False,
    documents: str | None = None,
    max_sentences: int | None = None,
) -> Dataset | IterableDataset:
    """Reads the records of a file, a folder of files, or the train split of a hub set (NAME or NAME:CONFIG), all of one form.

    ``documents`` and ``max_sentences`` are about running text: see ``Texts``.

    Every record is checked before anything else happens; under ``streaming``, when it is reached. Files are read a record
    at a time (but for JSON lists) into a table on disk, which is cached by the hash of their content.

    Raises:
        UserError: the path or the record that cannot be used, and what to do about it.
    """
    mapping, texts = tuple((columns or {}).items()), (documents, max_sentences)
    files = local_files(path)
    if files is not None:
        digest = digest_of(files, contents=not streaming)
        rows: Callable = _file_rows
        names = [str(file) for file in files]  # a list would be read a file at a time, each from a count of its own
        source: dict[str, Any] = {
            "files": names if max_sentences is None else tuple(names),
            "digest": f"{VERSION} {digest}",
            "whole_lists": not streaming,
        }
    else:
        rows, source = _hub_rows, {"data": _from_hub(str(path), cache_dir, streaming), "name": str(path)}
    source |= {"columns": mapping, "texts": texts}
    first = next(rows(**source, form=None), None)
    if first is None:
        raise UserError(f"{path}: there is no record in it; give a file with at least one")
    source |= {"form": form_of(first)}
    features = FORMS[form_of(first)]
    if streaming:
        return IterableDataset.from_generator(rows, gen_kwargs=source, features=features)
    try:
        return Dataset.from_generator(rows, gen_kwargs=source, cache_dir=cache_dir, features=features)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def local_files(path: str | Path) -> list[Path] | None:
    """The files that a path names, None for the name of a hub set. Raises UserError for a path that leads nowhere."""
    place = Path(path).expanduser()
    if exists(place) or kind_of_file(place) in FILE_KINDS or str(path).startswith((".", "/", "~")):
        return list_files(place)
    return None


def _file_rows(
    files: Sequence[str], digest: str, whole_lists: bool, columns, texts: tuple, form: str | None
) -> Iterator[Record]:
    """The generator behind the cached table. ``digest`` makes changed files another table; the files are its shards."""
    running = Texts(*texts)
    for file in map(Path, files):
        records = _of_one_form(read_file(file, whole_lists), dict(columns), form)
        for record in running.documents(records, in_lines=kind_of_file(file) == TEXT_FILE):
            form = form or form_of(record)
            yield record


def _from_hub(name: str, cache_dir: str | None, streaming: bool) -> Dataset | IterableDataset:
    path, _, config = name.partition(":")
    try:
        with quiet_hub():
            return load_dataset(path, *([config] if config else []), split="train", cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # the hub raises many kinds of errors: not found, no network, gated, a bad name
        raise UserError(f"{name}: no such file, and the hub did not give it ({first_line(error)})") from None


def _hub_rows(data: Dataset | IterableDataset, name: str, columns, texts: tuple, form: str | None) -> Iterator[Record]:
    batches = data.with_format("arrow").iter(batch_size=1000)  # as it stands: datasets would open files that it names
    rows = enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    records = _of_one_form(((f"{name}:record {number}", row) for number, row in rows), dict(columns), form)
    yield from Texts(*texts).documents(records, in_lines=False)


def _of_one_form(values: Iterator[Placed], columns: dict[str, str], form: str | None) -> Iterator[Record]:
    """The records. Raises UserError at one that is not of the ``form``, by default the first one's."""
    for where, value in values:
        record = canonical(value, where, columns)
        form = form or form_of(record)
        if form_of(record) != form:
            raise UserError(f"{where}: a record of the form {form_of(record)} after {form}: give them as two sources")
        yield record


def canonical(value: object, where: str, columns: Mapping[str, str] | None = None, needs_output: bool = True) -> Record:
    """The record in the form it has. Without ``needs_output`` it may be a prompt alone, for generation.

    Raises:
        UserError: what is wrong with it, at the place ``where``.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: {kind_of(value)}, wanted an object with instruction and output; {MEND}")
    record = _renamed(value, columns or {})
    name = next((name for name in OWN["chat"] if record.get(name) is not None), None)
    if name is not None:
        return {"messages": _messages(record[name], f"{where}: {name!r}", columns, record.get("system"))}
    if isinstance(record.get("prompt"), list):  # a conversation in two parts
        answer = record.get("completion") or []
        parts = [*record["prompt"], *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)]
        return {"messages": _messages(parts, f"{where}: 'prompt'", columns, record.get("system"))}
    needed, optional = ["instruction", "output"], ["input", "system"]
    if record.get("instruction") is None and record.get("prompt") is not None:
        needed, optional = ["prompt", "completion"], []
    elif record.get("instruction") is None and record.get("output") is None and "text" in record:
        needed, optional = ["text"], []
    elif "instruction" not in record and "prompt" in record:
        needed, optional = ["prompt", "completion"], []
    if not needs_output:
        needed, optional = needed[:1], [*needed[1:], *optional]
    return _strings(record, needed, optional, where)


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with our names for its columns. Columns that were asked for decide the form: those of others are left out."""
    named = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    chosen = [own for own in OWN.values() if named.keys() & own]
    others = {name for own in OWN.values() if chosen and own not in chosen for name in own}
    return {name: value for name, value in (record | named).items() if name not in others}


def _strings(record: Record, needed: list[str], optional: list[str], where: str) -> Record:
    for name in needed:
        if name not in record:
            has = ", ".join(map(str, record)) or "none"
            or_text = ", or text=NAME" if name == "instruction" else ""
            raise UserError(f"{where}: no field {name!r}; it has {has} (another name? --columns {name}=NAME{or_text})")
    row = {name: record[name] for name in needed}
    row |= {name: "" if record.get(name) is None else record[name] for name in optional}
    for name, text in row.items():
        check_text(text, f"{where}: {name!r}")
    return row


def _messages(value: object, where: str, columns: Mapping[str, str] | None, system: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is no list of messages, or an empty one; wanted [{{'role': ..., 'content': ...}}, ...]")
    names = {"role": ("role", "from"), "content": ("content", "value")}
    found = []
    for number, message in enumerate(value, 1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{place}: {kind_of(message)}, wanted an object with role and content; {MEND}")
        if message.get("tool_calls"):
            raise UserError(f"{place}: tool calls cannot be trained on; write them into the content")
        row = {}
        for name, candidates in names.items():
            keys = [(columns or {}).get(name, candidates[0]), *candidates]
            key = next((key for key in keys if message.get(key) is not None), None)
            if key is None:
                raise UserError(f"{place}: no {name!r}; it has {', '.join(map(str, message)) or 'nothing'}")
            row[name] = message[key]
        if isinstance(row["content"], list) and all(isinstance(p, dict) and p.get("type") == "text" for p in row["content"]):
            row["content"] = "".join(str(part.get("text", "")) for part in row["content"])
        check_text(row["content"], f"{place}: 'content'")
        role = ROLES.get(str(row["role"]).lower())
        if role is None:
            raise UserError(f"{place}: role {row['role']!r}; known are {', '.join(ROLES)}")
        found.append({"role": role, "content": row["content"]})
    if system:
        check_text(system, f"{where}: 'system'")
        found.insert(0, {"role": "system", "content": system})
    return found


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    return KINDS.get(type(value).__name__, f"a {type(value).__name__}")


def check_text(value: object, where: str) -> None:
    """Raises UserError for what is no text that can be encoded."""
    if not isinstance(value, str):
        raise UserError(f"{where} is {kind_of(value)}, wanted a string; {MEND}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has a lone surrogate, which is no text; remove it") from None
