"""From records to texts: Alpaca's prompt template, and texts as they are; where they are trained, and with which end.

The wording is Stanford Alpaca's (Apache-2.0, https://github.com/tatsu-lab/stanford_alpaca), byte for byte, because models
tuned with it expect exactly this text. The response follows ``### Response:`` directly.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from stanford_alpaca.data.encode import TextEncoder, clean
from stanford_alpaca.errors import UserError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)  # fmt: skip

Messages = list[dict[str, str]]  # {"role": system | user | assistant | tool, "content": text}


class Rendered(NamedTuple):
    """A text and what of it is trained."""

    text: str
    spans: list[tuple[int, int]]  # characters [start, end), in order; a token is trained if it starts in one


def format_prompt(record: Mapping[str, str]) -> str:
    """Alpaca's prompt of a record with an ``instruction`` and, unless absent or empty, ``input`` and ``system``.

    A system prompt takes the place of Alpaca's own first lines.
    """
    opening = record.get("system") or (WITH_INPUT if record.get("input") else WITHOUT_INPUT)
    question = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
    return f"{opening}\n\n### Instruction:\n{record['instruction']}\n\n{question}### Response:"


Turn = tuple[str, str]  # a prompt and the response to it


class TurnsTemplate:
    """Prompts and responses one after the other, the end-of-sequence token after every response.

    Args:
        turns: the turns of a record, ``alpaca_turns`` or ``plain_turns``.
    """

    add_special_tokens = True  # whether the tokenizer puts its own (a beginning-of-sequence token) before the text

    def __init__(self, turns: Callable[[Mapping], list[Turn]], encoder: TextEncoder):
        self.turns, self.end = turns, encoder.special(encoder.eos_token)

    def render(self, record: Mapping) -> Rendered:
        """The text of a record and the spans of its responses with their ends; an empty response is not trained.

        Raises:
            UserError: a record that this template cannot write.
        """
        text, spans = "", []
        for prompt, response in self.turns(record):
            start = len(text) + len(prompt)
            text += prompt + response + self.end
            if response:
                spans.append((start, len(text)))
        return Rendered(text, spans)

    def prompt(self, record: Mapping) -> str:
        """The text that generation continues: the record without its last response. Raises UserError as ``render``."""
        *history, (prompt, _) = self.turns(record)
        return "".join(before + response + self.end for before, response in history) + prompt


def plain_turns(record: Mapping) -> list[Turn]:
    """Prompt and completion as they are, or a text that is trained as a whole."""
    if "text" in record:
        return [("", clean(record["text"]))]
    return [(clean(record["prompt"]), clean(record.get("completion") or ""))]


def alpaca_turns(record: Mapping) -> list[Turn]:
    """The record in Alpaca's words; the later questions of a conversation come without the first lines.

    Raises:
        UserError: a conversation that does not alternate from user to assistant.
    """
    if "instruction" in record:
        return [(clean(format_prompt(record)), clean(record.get("output") or ""))]
    messages = as_messages(record)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    if len(messages) % 2:
        messages.append({"role": "assistant", "content": ""})  # a question that waits for its answer
    roles, texts = [message["role"] for message in messages], [clean(message["content"]) for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise UserError(f"the turns do not alternate from user to assistant: {', '.join(roles)}")
    prompts = [f"\n\n### Instruction:\n{question}\n\n### Response:" for question in texts[::2]]
    prompts[0] = clean(format_prompt({"instruction": texts[0], "system": system}))
    return list(zip(prompts, texts[1::2], strict=True))


def as_messages(record: Mapping) -> Messages:
    """Any record but a text as a conversation; the response, if there is one, is its last message."""
    if "messages" in record:
        return list(record["messages"])
    if "prompt" in record:
        question, answer, system = record["prompt"], record.get("completion"), None
    else:
        question = record["instruction"] + (f"\n\n{record['input']}" if record.get("input") else "")
        answer, system = record.get("output"), record.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages


def as_shown(record: Mapping) -> dict[str, str]:
    """What a reader wants to see of a record: ``instruction``, ``input`` and, if it has one, the ``reference``."""
    if "instruction" in record:
        return {
            "instruction": record["instruction"],
            "input": record.get("input") or "",
            "reference": record.get("output") or "",
        }
    messages = as_messages(record)
    reference = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    asked = [m["content"] for m in messages] if len(messages) == 1 else [f"{m['role']}: {m['content']}" for m in messages]
    return {"instruction": "\n".join(asked), "input": "", "reference": reference}
