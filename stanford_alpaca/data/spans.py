"""Which characters of a rendered conversation the assistant has to write, found by putting marks into it.

Noncharacters go around every message's text, the template is rendered, and they show where it put each one. What stands between
the text before and an answer is compared with the generation prompt for it, what stands behind it with the conversation's end.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from stanford_alpaca.data.messages import REASONING, Messages
from stanford_alpaca.errors import UserError

OPEN, CLOSE = "\ufdd1", "\ufdd2"  # around the numbers of the marks
MARK = re.compile(
    f"{OPEN}([<>])(\\d+){CLOSE}"
)  # "<3": the text of message 3 begins, ">3": it has ended


class Span(NamedTuple):
    """Characters [start, end) that are trained, and the index of the message that they are of."""

    start: int
    end: int
    message: int


class Marked(NamedTuple):
    """A rendered text without the marks, and where the texts of messages begin (the assistant's) and end in it."""

    text: str
    begins: dict[int, int]
    ends: dict[int, int]


def find_spans(
    render: Callable[..., str],  # messages to text; add_generation_prompt=True asks for an answer
    messages: Messages,  # the last one is the assistant's
    text: str,  # of all of them
    cues: list[str],  # the generation prompt, and what it is where it asks otherwise for reasoning
    added: re.Pattern,  # the tokenizer's added tokens
    end_of_turn: re.Pattern,  # those that end a turn
) -> list[Span]:
    """The spans of the answers that say something, in order. Raises UserError where the template does not let them be found."""

    def is_answer(message: dict) -> bool:
        return message["role"] == "assistant" and bool(_anchors(message))

    # a template may look at the ends of other messages' texts (Qwen3's does), where a mark would be in the way
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
    """Where the model starts to write message i: behind the generation prompt, as far as the text has it.

    Prompts are compared from the end of the last text before: what a template writes further up may differ between a
    prompt and the whole (a system prompt that moves, thoughts that are dropped).
    """
    text, begins, ends = found
    if i not in ends:
        return None
    limit = begins.get(i, ends[i])
    before = ends.get(
        max((j for j in ends if j < i and ends[j] <= limit), default=-1), 0
    )  # of the last text before
    between = text[before:limit]
    whole = (
        tail
        if tail is not None and text.startswith(tail, before) and before + len(tail) <= ends[i]
        else None
    )
    if whole is not None and whole.endswith(cues[0]):
        return before + len(whole)
    for cue in cues:  # the prompt closes the message before otherwise, or has no cue there
        if cue and cue in between:
            return before + (between.index(cue) if all_marked else between.rindex(cue)) + len(cue)
    if whole is not None:
        return before + len(whole)
    shared = shared_length(tail or "", between, added)
    if (
        i in begins and between[shared:].strip() and message["content"].strip()
    ):  # it is not the model's, as far as one can see
        content = message["content"]
        space = content[
            : len(content) - len(content.lstrip())
        ]  # which a token may have in common with the first word
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
    """Where the model has written message i: behind the last token that closes it, wherever else the conversation goes."""
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
    """What the prompt for an answer to ``history`` has behind the text of the last message, if the template takes it."""
    try:
        prompt, _, ends = marked_text(render, history, marked, add_generation_prompt=True)
    except UserError:
        return None
    return prompt[ends[max(ends)] :] if ends else prompt


def _tail_of(
    i: int, render: Callable[..., str], messages: Messages, marked: Callable[[dict], bool]
) -> str | None:
    """What stands behind the text of message i where it is the last."""
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
    """The rendered text, and where the texts of the ``marked`` messages stand in it."""
    with_marks = [
        _with_marks(i, message) if marked(message) else message
        for i, message in enumerate(messages)
    ]
    pieces = MARK.split(render(with_marks, **options))
    text = pieces[0]
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    for kind, number, piece in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        (begins if kind == "<" else ends).setdefault(
            int(number), len(text)
        )  # a result may repeat the name of its call
        text += piece
    return Marked(text, begins, ends)


def _anchors(message: dict) -> list[str]:
    """What of a message is marked: its reasoning, its text, the names of its calls."""
    texts = [name for name in ("reasoning_content", "content") if message.get(name, "").strip()]
    return [*texts, *(["tool_calls"] if message.get("tool_calls") else [])]


def _with_marks(i: int, message: dict) -> dict:
    """A message with a mark before each of its anchors, if it is the assistant's, and one behind the last: of the marks of a
    beginning, that counts which is found first."""
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
    """A text with marks around all of it but the white space at its ends."""
    core = content.strip()
    space = content[: len(content) - len(content.lstrip())] if core else content
    return f"{space}{before}{core}{after}{content[len(space) + len(core) :]}"


def _named(calls: list[dict], before: str, after: str) -> list[dict]:
    """Calls with marks around the first name and the last."""
    written = [{**call, "function": dict(call["function"])} for call in calls]
    written[0]["function"]["name"] = before + written[0]["function"]["name"]
    written[-1]["function"]["name"] += after
    return written


def shared_length(one: str, other: str, added: re.Pattern | None = None) -> int:
    """The number of characters with which both begin, no part of an ``added`` token among them."""
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
    """One of the names; those that are white space end nothing."""
    known = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) if known else "(?!)")
