"""Finds which characters of a rendered conversation the assistant writes, by marking the messages.

Marks made of noncharacters go around every message's text. In the rendered conversation they show
where the template put each text. What stands between an answer and the text before it is compared
with the generation prompt for the answer. What stands after the answer is compared with the end of
a conversation that ends with it.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from stanford_alpaca.data.messages import REASONING, Messages
from stanford_alpaca.errors import UserError

OPEN, CLOSE = "\ufdd1", "\ufdd2"  # around each mark
MARK = re.compile(f"{OPEN}([<>])(\\d+){CLOSE}")  # "<3": message 3's text begins; ">3": it ends


class Span(NamedTuple):
    """Characters [start, end) that are trained, and the index of the message they belong to."""

    start: int
    end: int
    message: int


class Marked(NamedTuple):
    """A rendered text without the marks, and where the texts of messages begin and end in it."""

    text: str
    begins: dict[int, int]  # message of the assistant -> character
    ends: dict[int, int]  # message -> character


def find_spans(
    render: Callable[..., str],  # messages to text; add_generation_prompt=True asks for an answer
    messages: Messages,  # the last one is the assistant's
    text: str,  # the rendered text of all messages
    cues: list[str],  # see ``chat.ChatTemplate``
    added: re.Pattern,  # the tokenizer's added tokens
    end_of_turn: re.Pattern,  # the tokens that end a turn
) -> list[Span]:
    """Returns the spans of the answers that say something, in order.

    Raises:
        UserError: the template hides where the answers are.
    """

    def is_answer(message: dict) -> bool:
        return message["role"] == "assistant" and bool(_anchors(message))

    # a template may look at the ends of other messages' texts (Qwen3's does), and a mark there
    # would change the result; the second attempt marks only the answers
    for marked in (lambda message: True, is_answer):
        found = marked_text(render, messages, marked)
        if found.text == text:
            break
    else:
        raise UserError("the chat template does not write the texts of the messages as they are")
    spans = []
    for i in (i for i, message in enumerate(messages) if is_answer(message)):
        tail = _tail(render, messages[:i], marked)
        start = _start(i, messages[i], found, cues, tail, added, marked is not is_answer)
        if start is None:
            raise UserError(f"the chat template hides where message {i + 1} begins or ends")
        whole = i == len(messages) - 1
        after = text[found.ends[i] :] if whole else _tail_of(i, render, messages[: i + 1], marked)
        end = _end(i, messages[i], found, after, added, end_of_turn)
        spans.append(Span(start, end, i))
    return spans


def _start(
    i: int,
    message: dict,
    found: Marked,
    cues: list[str],
    tail: str | None,
    added: re.Pattern,
    all_marked: bool,
) -> int | None:
    """Returns where the model starts to write message i, or None if the template hides it.

    It starts after the generation prompt, as far as the text contains that prompt. The comparison
    begins at the end of the last message text before. What a template writes further up may differ
    between the prompt and the whole conversation: a system prompt moves, or reasoning is dropped.

    Args:
        tail: what the prompt for message i has after the last message text, see ``_tail``.
        all_marked: whether all messages are marked, not only the answers.
    """
    text, begins, ends = found
    if i not in ends:
        return None
    limit = begins.get(i, ends[i])
    # the end of the last message text before
    before = ends.get(max((j for j in ends if j < i and ends[j] <= limit), default=-1), 0)
    between = text[before:limit]
    whole = (
        tail
        if tail is not None and text.startswith(tail, before) and before + len(tail) <= ends[i]
        else None
    )
    if whole is not None and whole.endswith(cues[0]):
        return before + len(whole)
    # the prompt ends the message before in another way than the text does, or has no cue there
    for cue in cues:
        if cue and cue in between:
            return before + (between.index(cue) if all_marked else between.rindex(cue)) + len(cue)
    if whole is not None:
        return before + len(whole)
    shared = shared_length(tail or "", between, added)
    if i in begins and between[shared:].strip() and message["content"].strip():
        # nothing shows that the model writes what stands before its text, so the text is the start
        content = message["content"]
        # white space before the first word belongs to the answer: both may be in one token
        space = content[: len(content) - len(content.lstrip())]
        return begins[i] - (len(space) if between.endswith(space) else 0)
    return before + shared if tail is not None or i in begins else None


def _end(
    i: int,
    message: dict,
    found: Marked,
    after: str | None,
    added: re.Pattern,
    end_of_turn: re.Pattern,
) -> int:
    """Returns where the model ends message i: after the last token that closes it.

    Args:
        after: what stands after the text of the message if the conversation ends there.
    """
    text, end = found.text, found.ends[i]
    closing = (after or "")[: shared_length(after or "", text[end:])]
    tokens = list(added.finditer(closing))
    if tokens:
        end += tokens[-1].end()
    elif message.get("tool_calls"):
        end += len(closing.rstrip())
    space = len(text) - len(text[end:].lstrip())
    following = end_of_turn.match(text, space)
    return following.end() if following else end


def _tail(
    render: Callable[..., str], history: Messages, marked: Callable[[dict], bool]
) -> str | None:
    """Returns what the prompt for an answer to ``history`` has after its last message text.

    Returns None if the template refuses the history.
    """
    try:
        prompt, _, ends = marked_text(render, history, marked, add_generation_prompt=True)
    except UserError:
        return None
    return prompt[ends[max(ends)] :] if ends else prompt


def _tail_of(
    i: int, render: Callable[..., str], messages: Messages, marked: Callable[[dict], bool]
) -> str | None:
    """Returns what stands after the text of message i if it is the last message, or None."""
    try:
        text, _, ends = marked_text(render, messages, marked)
    except UserError:
        return None
    return text[ends[i] :] if i in ends else None


def marked_text(
    render: Callable[..., str],
    messages: Messages,
    marked: Callable[[dict], bool] = lambda message: True,
    **options: bool,
) -> Marked:
    """Returns the rendered text, and where the texts of the ``marked`` messages are in it."""
    with_marks = [
        _with_marks(i, message) if marked(message) else message
        for i, message in enumerate(messages)
    ]
    pieces = MARK.split(render(with_marks, **options))
    text = pieces[0]
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    for kind, number, piece in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        # only the first mark counts: a tool's result may repeat the name of its call, and a mark
        (begins if kind == "<" else ends).setdefault(int(number), len(text))
        text += piece
    return Marked(text, begins, ends)


def _anchors(message: dict) -> list[str]:
    """Returns the fields of a message that get marks: reasoning, text, and the names of calls."""
    texts = [name for name in ("reasoning_content", "content") if message.get(name, "").strip()]
    return [*texts, *(["tool_calls"] if message.get("tool_calls") else [])]


def _with_marks(i: int, message: dict) -> dict:
    """Puts a mark after the last anchor of a message and, in the assistant's, before each anchor.

    Of the marks before anchors, the one that comes first in the rendered text counts.
    """
    anchors = _anchors(message) or ["content"]
    begin, end = (
        f"{OPEN}<{i}{CLOSE}" if message["role"] == "assistant" else "",
        f"{OPEN}>{i}{CLOSE}",
    )
    written = dict(message)
    for name in anchors:
        after = end if name == anchors[-1] else ""
        if name == "tool_calls":
            written[name] = _named(message[name], begin, after)
        else:
            names = (
                [name] if name == "content" else [other for other in REASONING if other in message]
            )
            written |= dict.fromkeys(names, _around(message[name], begin, after))
    return written


def _around(content: str, before: str, after: str) -> str:
    """Puts marks around a text, inside the white space at its ends."""
    core = content.strip()
    space = content[: len(content) - len(content.lstrip())] if core else content
    return f"{space}{before}{core}{after}{content[len(space) + len(core) :]}"


def _named(calls: list[dict], before: str, after: str) -> list[dict]:
    """Puts a mark before the name of the first call, and one after the name of the last."""
    written = [{**call, "function": dict(call["function"])} for call in calls]
    written[0]["function"]["name"] = before + written[0]["function"]["name"]
    written[-1]["function"]["name"] += after
    return written


def shared_length(one: str, other: str, added: re.Pattern | None = None) -> int:
    """Returns the length of the common prefix of two texts, which splits no ``added`` token."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    for token in (
        token for text in (one, other) for token in (added.finditer(text) if added else ())
    ):
        if token.start() < shared < token.end():
            return token.start()
    return shared


def token_pattern(names: list[str]) -> re.Pattern:
    """Returns the pattern that matches any of the names, except those that are white space."""
    known = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) if known else "(?!)")
