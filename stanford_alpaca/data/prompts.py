"""Turns records into texts, with Alpaca's prompt template or without any.

Each text comes with the spans that are trained: the responses, each with its end-of-sequence
token. The wording is Stanford Alpaca's (Apache-2.0, https://github.com/tatsu-lab/stanford_alpaca),
byte for byte, because models tuned with it expect exactly this text. The response follows
``### Response:`` directly.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.messages import Messages, more_of, pack
from stanford_alpaca.errors import UserError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)

# stands in a question before the input; an empty line separates it from the instruction
HEADING = "### Input:\n"


class Rendered(NamedTuple):
    """A text, and which parts of it are trained."""

    text: str
    # characters [start, end), in order; a token is trained if it lies within a span
    spans: list[tuple[int, int]]
    weights: list[float]  # one per span: by how much its loss is multiplied
    # what of the record is not in the text as a reader may expect it; the report counts them
    notes: Sequence[str] = ()


def text_note(names: list[str]) -> list[str]:
    """Returns a note for each name of a special token that stays text."""
    return [
        f"{name!r} in a field is text, not the special token "
        "(--special_tokens parse reads it as one)"
        for name in names
    ]


def format_prompt(record: Mapping[str, str]) -> str:
    """Returns Alpaca's prompt for a record with an ``instruction``.

    ``input`` and ``system`` may be absent or empty. A system prompt takes the place of Alpaca's
    own first lines.
    """
    opening = opening_of(record.get("system"), bool(record.get("input")))
    question = f"{HEADING}{record['input']}\n\n" if record.get("input") else ""
    return f"{opening}\n\n### Instruction:\n{record['instruction']}\n\n{question}### Response:"


def opening_of(system: str | None, with_input: bool) -> str:
    """Returns the first lines of a prompt: the system prompt if there is one, else Alpaca's own."""
    return system or (WITH_INPUT if with_input else WITHOUT_INPUT)


class Turn(NamedTuple):
    """A prompt and the response to it, as they are in the record."""

    prompt: str
    response: str
    weight: float = 1.0


class TurnsTemplate:
    """Writes prompts and responses in turn, with the end-of-sequence token after every response.

    Args:
        turns: returns the turns of a record: ``alpaca_turns`` or ``plain_turns``.
    """

    def __init__(self, turns: Callable[[Mapping], list[Turn]], encoder: TextEncoder):
        self.turns, self.encoder, self.end = turns, encoder, encoder.special(encoder.eos_token)

    def adds_special_tokens(self, text: str) -> bool:
        """Returns whether the tokenizer puts its first token, such as a BOS token, before the text.

        It does not if the text already begins with that token.
        """
        return not self.encoder.begins(text)

    def render(self, record: Mapping) -> Rendered:
        """Returns the text of a record, and the spans of its responses with their ends.

        An empty response is not trained.

        Raises:
            UserError: this template cannot write the record.
        """
        text, spans, weights = "", [], []
        names: dict[str, None] = {}
        for turn in self.turns(record):
            prompt, response, kept = self._written(turn)
            start = len(text) + len(prompt)
            text += prompt + response
            names |= dict.fromkeys(kept)
            if turn.response:
                spans.append((start, len(text)))
                weights.append(turn.weight)
        return Rendered(text, spans, weights, [*text_note(list(names)), *_left_out(record)])

    def prompt(self, record: Mapping) -> str:
        """Returns the text that generation continues: the record without its last response.

        Raises:
            UserError: this template cannot write the record.
        """
        *history, last = self.turns(record) or [Turn("", "")]
        return (
            "".join("".join(self._written(turn)[:2]) for turn in history) + self._written(last)[0]
        )

    def _written(self, turn: Turn) -> tuple[str, str, list[str]]:
        """Returns the prompt and the response with its end-of-sequence token.

        Also returns the names of special tokens that are text in them.
        """
        prompt, in_prompt = self.encoder.field(turn.prompt)
        response, in_response = self.encoder.field(turn.response, answer=True)
        closed = response.rstrip().endswith(self.end)
        return prompt, response if closed else response + self.end, in_prompt + in_response


def plain_turns(record: Mapping) -> list[Turn]:
    """Returns the turns of a record without any template.

    A ``text`` is trained as a whole. A ``prompt`` and its ``completion`` are one turn. In other
    records, all that is said before an answer is its prompt.

    Raises:
        UserError: the conversation has tools.
    """
    weight = more_of(record).get("weight", 1.0)
    if "text" in record:
        return [Turn("", record["text"], weight)]
    if "prompt" in record:
        return [Turn(record["prompt"], record.get("completion") or "", weight)]
    messages = as_messages(record)
    _refuse_tools(record, messages, "texts as they are have no place")
    turns, asked = [], ""
    for message in messages:
        if message["role"] == "assistant":
            turns.append(Turn(asked, message["content"], more_of(message).get("weight", 1.0)))
            asked = ""
        else:
            asked += message["content"]
    return [*turns, Turn(asked, "")] if asked else turns


def alpaca_turns(record: Mapping) -> list[Turn]:
    """Returns the turns of a record in Alpaca's words.

    The later questions of a conversation come without the first lines.

    Raises:
        UserError: the conversation has tools, or does not alternate from user to assistant.
    """
    messages = as_messages(record, heading=HEADING)
    _refuse_tools(record, messages, "Alpaca's template has no place")
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if len(messages) % 2:
        # the last question has no answer yet
        messages.append({"role": "assistant", "content": ""})
    roles, texts = (
        [message["role"] for message in messages],
        [message["content"] for message in messages],
    )
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise UserError(f"the turns do not alternate from user to assistant: {', '.join(roles)}")
    prompts = [f"\n\n### Instruction:\n{question}\n\n### Response:" for question in texts[::2]]
    is_single = "instruction" in record and not more_of(record).get("history")
    prompts[0] = (
        opening_of(system, bool(record.get("input")) if is_single else f"\n\n{HEADING}" in texts[0])
        + prompts[0]
    )
    weights = [more_of(message).get("weight", 1.0) for message in messages[1::2]]
    return [Turn(*turn) for turn in zip(prompts, texts[1::2], weights, strict=True)]


def _refuse_tools(record: Mapping, messages: Messages, who: str) -> None:
    """Raises UserError for tools, their calls and their results."""
    found = {
        "tools": "tools" in more_of(record),
        "the calls of tools": any("tool_calls" in more_of(message) for message in messages),
        "the results of tools": any(message["role"] == "tool" for message in messages),
    }
    for what in (name for name, there in found.items() if there):
        raise UserError(f"{who} for {what}; use --prompt_template chat")


def as_messages(record: Mapping, heading: str = "") -> Messages:
    """Returns any record except a text as a conversation.

    The response, if there is one, is its last message.

    Args:
        heading: stands before the input of an Alpaca record, after its instruction and an empty
            line.
    """
    more = more_of(record)
    if "messages" in record:
        return [_weighted(message, more.get("weight", 1.0)) for message in record["messages"]]
    if "prompt" in record:
        question, answer, system = record["prompt"], record.get("completion"), None
    else:
        question = record["instruction"] + (
            f"\n\n{heading}{record['input']}" if record.get("input") else ""
        )
        answer, system = record.get("output"), record.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [*more.get("history", ()), {"role": "user", "content": question}]
    if answer:
        messages.append({"role": "assistant", "content": answer})
    return [_weighted(message, more.get("weight", 1.0)) for message in messages]


def _weighted(message: Mapping, weight: float) -> dict[str, Any]:
    """Returns a message with its weight multiplied by ``weight``, that of its record."""
    if weight == 1 or message["role"] != "assistant":
        return dict(message)
    more = more_of(message)
    return {**message, "more": pack(more | {"weight": weight * more.get("weight", 1.0)})}


def _left_out(record: Mapping) -> list[str]:
    """Returns notes on fields of a record's messages that this template does not write."""
    more = [more_of(message) for message in record.get("messages", ())]
    notes = {"reasoning_content": "the reasoning of a turn", "name": "the name of a message"}
    return [
        f"{what} has no place in this template: left out"
        for field, what in notes.items()
        if any(field in of for of in more)
    ]


def as_shown(record: Mapping) -> dict[str, str]:
    """Returns what a reader wants to see of a record.

    It is the ``instruction``, the ``input`` and the ``reference``, which is "" if the record has
    no response.
    """
    if "instruction" in record:
        return {
            "instruction": record["instruction"],
            "input": record.get("input") or "",
            "reference": record.get("output") or "",
        }
    messages = as_messages(record)
    reference = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    asked = (
        [m["content"] for m in messages]
        if len(messages) == 1
        else [f"{m['role']}: {m['content']}" for m in messages]
    )
    return {"instruction": "\n".join(asked), "input": "", "reference": reference}
