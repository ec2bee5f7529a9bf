"""Reads the messages of a record: roles, texts, and other fields that chat templates read.

A message is ``{"role", "content", "more"}``. ``more`` is a string: a JSON object, or "" if there
are no other fields. It holds what a template may read (``reasoning_content``, ``tool_calls``,
``tool_call_id``, ``name``), and ``weight``, by which the loss of the turn is multiplied.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from stanford_alpaca.data.strict_json import JSON
from stanford_alpaca.errors import UserError, first_line

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function", "function_response", "tool_response"), "tool"
    ),
    # turns of the assistant whose content is their calls
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
MEND = "mend the record or take it out"
JSON_NAMES = {  # Python's type -> JSON's words for a value
    "bool": "true or false",
    "NoneType": "null",
    "int": "a number",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
}
# the names of an answer's reasoning in published data
REASONING = ("reasoning_content", "thinking", "reasoning")
SAID = {**dict.fromkeys(("true", "1", "yes"), True), **dict.fromkeys(("false", "0", "no"), False)}
HEAVIEST = 1_000_000  # the greatest weight; the loss is in float32
NOTHING: tuple = (None, "", [], {})  # values that say nothing

Messages = list[dict[str, Any]]


def pack(fields: Mapping[str, Any]) -> str:
    """Packs the fields that say something into JSON for a column of a table, or "" if none does."""
    said = {name: value for name, value in fields.items() if value not in NOTHING}
    return json.dumps(said, ensure_ascii=False) if said else ""


def more_of(of: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that ``pack`` put into the column ``more`` of a record or a message."""
    return json.loads(of["more"]) if of.get("more") else {}


def json_name(value: object) -> str:
    """Returns JSON's words for a value."""
    return JSON_NAMES.get(type(value).__name__, f"a {type(value).__name__}")


def check_text(value: object, where: str) -> None:
    """Raises UserError for a value that is no string or cannot be encoded in UTF-8."""
    if not isinstance(value, str):
        raise UserError(f"{where} is {json_name(value)}, wanted a string; {MEND}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has a lone surrogate, which is no text; remove it") from None


def parsed(value: object, where: str, wanted: str) -> Any:
    """Decodes a value that may be JSON in a string. Raises UserError for a string that is not JSON.

    Returns None for an empty value.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return JSON.decode(value)
    except (ValueError, RecursionError) as error:
        reason = first_line(error).partition(": line")[0]
        raise UserError(
            f"{where} is a string that is no JSON, wanted {wanted} ({reason}); {MEND}"
        ) from None


def read_weight(fields: Mapping[str, Any], where: str) -> tuple[float, set[str]]:
    """Returns by how much to multiply the loss of a record or a turn, and the fields read for it.

    These fields are ``weight`` and ``train``. A ``weight`` that is no number, and a ``train`` that
    says neither yes nor no, mean something else and are not read.

    Raises:
        UserError: the weight is negative or too great.
    """
    weight, read = 1.0, set()
    given = fields.get("weight")
    try:
        number = float(given)  # type: ignore[arg-type]  # CSV has strings
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        number = None
    if number is not None:
        if not 0 <= number <= HEAVIEST:
            raise UserError(
                f"{where}: 'weight' is {str(given)[:20]}, wanted a number from 0 to {HEAVIEST:,}; "
                f"{MEND}"
            )
        weight, read = number, {"weight"}
    train = SAID.get(str(fields.get("train")).lower())
    if train is not None:
        weight, read = weight * train, read | {"train"}
    return weight, read


def read_tools(value: object, where: str) -> list[dict]:
    """Returns the tools that an assistant may call, from objects or from JSON of them.

    Raises:
        UserError: the value is something else.
    """
    tools = parsed(value, where, "a list of tools") or []
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and _is_tool(tool) for tool in tools
    ):
        raise UserError(f"{where} is no list of objects, wanted one for each tool; {MEND}")
    return tools


def _is_tool(tool: dict) -> bool:
    return isinstance(tool.get("function", {}), dict)


def read_messages(
    value: object,
    where: str,
    columns: Mapping[str, str] | None = None,
    system: object = None,
    unused: dict[str, None] | None = None,
) -> Messages:
    """Reads messages from a list of objects, from JSON of it, or from an object of lists.

    Parquet may hold an object of lists.

    Args:
        columns: our names ``role`` and ``content`` -> the names in the data.
        system: a system prompt that the record has beside the list.
        unused: gets the names of fields that are not read.

    Raises:
        UserError: the value is no conversation.
    """
    value = parsed(value, where, "a list of messages")
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(column, list) for column in value.values())
    ):
        if len({len(column) for column in value.values()}) > 1:
            raise UserError(
                f"{where}: an object of lists of several lengths, wanted one for each message; "
                f"{MEND}"
            )
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where} is no list of messages, or an empty one; "
            "wanted [{'role': ..., 'content': ...}, ...]"
        )
    unused = {} if unused is None else unused
    found = [
        _message(message, f"{where}, message {number}", columns or {}, unused)
        for number, message in enumerate(value, 1)
    ]
    if system:
        check_text(system, f"{where}: 'system'")
        found.insert(0, {"role": "system", "content": system, "more": ""})
    return found


def _message(
    message: object, place: str, columns: Mapping[str, str], unused: dict[str, None]
) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(
            f"{place}: {json_name(message)}, wanted an object with role and content; {MEND}"
        )
    keys = {
        name: next(
            (key for key in (columns.get(name, names[0]), *names) if message.get(key) is not None),
            None,
        )
        for name, names in {"role": ("role", "from"), "content": ("content", "value")}.items()
    }
    if keys["role"] is None:
        raise UserError(f"{place}: no 'role'; it has {', '.join(map(str, message)) or 'nothing'}")
    role = ROLES.get(str(message[keys["role"]]).lower())
    if role is None:
        known = ", ".join(ROLES)
        raise UserError(f"{place}: role {message[keys['role']]!r}; known are {known}")
    content = message[keys["content"]] if keys["content"] else None
    more, read = _beside(message, role, place, unused)
    if role == "call":
        more["tool_calls"] = read_calls(
            content, f"{place}: {keys['content'] or 'content'!r}", unused
        )
        role, content = "assistant", ""
    if isinstance(content, list) and (other := next(filter(None, map(_is_no_text, content)), None)):
        raise UserError(
            f"{place}: 'content' holds {other}, and text alone is trained; "
            "take it or the record out"
        )
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(_text_of(part, f"{place}: 'content'", unused) for part in content)
    if content is None:
        if not more.keys() & {"tool_calls", "reasoning_content"}:
            raise UserError(
                f"{place}: no 'content'; it has {', '.join(map(str, message)) or 'nothing'}"
            )
        content = ""
    check_text(content, f"{place}: 'content'")
    for name in message.keys() - read - set(keys.values()):
        if message[name] not in NOTHING:
            unused[f"messages.{name}"] = None
    packed = pack(more)
    check_text(packed, f"{place}: one of its fields")
    return {"role": role, "content": content, "more": packed}


def _is_no_text(part: object) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    return f"a part of type {kind!r}" if isinstance(kind, str) and kind != "text" else None


def _text_of(part: dict, where: str, unused: dict[str, None]) -> str:
    """Returns the text of one part of a message's content."""
    check_text(part.get("text"), f"{where}: the 'text' of a part")
    unused |= dict.fromkeys(
        f"messages.content.{name}"
        for name in part.keys() - {"type", "text"}
        if part[name] not in NOTHING
    )
    return part["text"]


def _beside(
    message: Mapping[str, Any], role: str, place: str, unused: dict[str, None]
) -> tuple[dict[str, Any], set[str]]:
    """Returns what is used of a message beside its role and content, and the fields read for it."""
    more: dict[str, Any] = {}
    weight, read = read_weight(message, place)
    if role in ("assistant", "call"):
        if weight != 1:
            more["weight"] = weight
        reasoning = next(
            (name for name in REASONING if isinstance(message.get(name), str) and message[name]),
            None,
        )
        if reasoning is not None:
            check_text(message[reasoning], f"{place}: {reasoning!r}")
            more["reasoning_content"] = message[reasoning]
            read |= {name for name in REASONING if message.get(name) == message[reasoning]}
        for name in ("tool_calls", "function_call"):  # the second is OpenAI's older name
            if message.get(name) and "tool_calls" not in more:
                more["tool_calls"] = read_calls(message[name], f"{place}: {name!r}", unused)
                read.add(name)
    elif weight not in (0, 1):
        read -= {"weight", "train"}  # only turns of the assistant are trained, whatever these say
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str) and message[name]:
            check_text(message[name], f"{place}: {name!r}")
            more[name] = message[name]
            read.add(name)
    return more, read


def read_calls(value: object, where: str, unused: dict[str, None] | None = None) -> list[dict]:
    """Returns tool calls in the form that chat templates take.

    It is ``{"type": "function", "function": {"name", "arguments"}}``, with the ``id`` if there is
    one. The arguments are an object.

    Args:
        unused: gets the names of fields that are not read.

    Raises:
        UserError: the value is no call.
    """
    value = parsed(value, where, "a call or a list of calls")
    return [
        _call(call, where, {} if unused is None else unused)
        for call in (value if isinstance(value, list) and value else [value])
    ]


def _call(call: object, where: str, unused: dict[str, None]) -> dict[str, Any]:
    call = call if isinstance(call, dict) else {}
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError(
            f"{where} is no call of a tool, wanted an object with name and arguments; {MEND}"
        )
    name = "arguments" if inner.get("arguments") is not None else "parameters"
    arguments = parsed(inner.get(name), f"{where}: {name!r} of a call", "an object") or {}
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: {name!r} of a call is {json_name(arguments)}, wanted an object; {MEND}"
        )
    function = {"name": inner["name"], "arguments": arguments}
    check_text(json.dumps(function, ensure_ascii=False), where)
    given = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    fields = (
        [(name, call) for name in call.keys() - {"type", "function", *given}]
        if inner is not call
        else []
    )
    fields += [(other, inner) for other in inner.keys() - {"type", "name", name, *given}]
    unused |= dict.fromkeys(
        f"messages.tool_calls.{other}" for other, of in fields if of[other] not in NOTHING
    )
    return {**given, "type": "function", "function": function}
