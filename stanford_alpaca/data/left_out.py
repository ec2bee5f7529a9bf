"""Finds what a chat template leaves out of a conversation.

A part is left out if the text is the same without it.
"""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from stanford_alpaca.data.messages import REASONING, Messages
from stanford_alpaca.data.spans import Span
from stanford_alpaca.errors import UserError

THOUGHTS = re.compile(r"</?think>")


class LeftOut:
    """Compares the text of a conversation with its text without some part.

    Args:
        render: turns messages and ``tools`` into a text; raises UserError if the template refuses
            them.
        text: the text of the whole conversation.
    """

    def __init__(
        self, render: Callable[..., str], messages: Messages, tools: list[dict] | None, text: str
    ):
        self.render, self.messages, self.tools, self.text = render, messages, tools, text

    def check(self, written: Container[int]) -> None:
        """Raises UserError for a tool, a call, a result or an answer that the template leaves out.

        Args:
            written: the indices of the messages whose marks (``spans.marked_text``) the template
                writes.
        """
        tools = self.tools or []
        for i, tool in enumerate(tools):
            if self._same(self.messages, [*tools[:i], *tools[i + 1 :]] or None):
                raise UserError(
                    f"the chat template has no place for tools: it leaves out {_name_of(tool)}"
                )
        for i, message in enumerate(self.messages):
            calls = message.get("tool_calls") or []
            if calls and self._same_with(i, tool_calls=None):
                raise UserError(
                    "the chat template has no place for the calls of tools: "
                    f"it leaves out message {i + 1}"
                )
            for k in range(len(calls) if len(calls) > 1 else 0):
                if self._same_with(i, tool_calls=[*calls[:k], *calls[k + 1 :]]):
                    raise UserError(f"the chat template leaves out call {k + 1} of message {i + 1}")
            if _is_thought_alone(message) and self._same_with(i, **dict.fromkeys(REASONING)):
                raise UserError(
                    f"the chat template leaves out message {i + 1}, which is reasoning alone"
                )
            if i in written or message["role"] not in ("assistant", "tool"):
                continue
            if self._loses_text(i):
                what = (
                    "has no place for the results of tools: it leaves"
                    if message["role"] == "tool"
                    else "leaves"
                )
                raise UserError(f"the chat template {what} out message {i + 1}")

    def check_trained(self, spans: list[Span], end_of_turn: re.Pattern) -> None:
        """Raises UserError for an answer of which only the end-of-turn token is trained.

        All that such an answer says is left out.
        """
        for i in {span.message for span in spans}:
            trained = "".join(
                self.text[span.start : span.end] for span in spans if span.message == i
            )
            if not end_of_turn.sub("", trained).strip():
                raise UserError(f"the chat template leaves out all that message {i + 1} says")

    def notes(self, spans: list[Span], written: Container[int]) -> list[str]:
        """Returns sentences about what else the template leaves out, each once."""
        return list(dict.fromkeys(self._notes(spans, written)))

    def _notes(self, spans: list[Span], written: Container[int]) -> Iterator[str]:
        for i, message in enumerate(self.messages):
            asked = message["role"] in ("system", "user")
            if asked and i not in written and self._loses_text(i):
                yield f"the template leaves out a message of the {message['role']}"
            if message["role"] != "tool" and message.get("name") and self._same_with(i, name=None):
                yield "the template leaves out the name of a message"
            for k, call in enumerate(message.get("tool_calls") or []):
                calls = list(message["tool_calls"])
                arguments = call["function"]["arguments"]
                calls[k] = {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": "{}" if isinstance(arguments, str) else {},
                    },
                }
                if arguments not in ({}, "{}") and self._same_with(i, tool_calls=calls):
                    yield "the template leaves out the arguments of a call"
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant" or not is_said(message):
                continue
            trained = _dense(
                "".join(self.text[span.start : span.end] for span in spans if span.message == i)
            )
            if any(_dense(part) not in trained for part in THOUGHTS.split(message["content"])):
                yield "the template leaves out or rewrites part of an answer"
            reasoning = message.get("reasoning_content", "")
            if reasoning and (
                _dense(reasoning) not in trained or self._same_with(i, **dict.fromkeys(REASONING))
            ):
                last = not any(other["role"] == "assistant" for other in self.messages[i + 1 :])
                advice = (
                    "the last answer, and all of it is lost; "
                    "--chat_template gives one that writes it"
                )
                yield f"the template leaves out the reasoning of {advice if last else 'a turn'}"

    def _loses_text(self, i: int) -> bool:
        text = self.messages[i]["content"].strip()
        return bool(text) and self._same_with(i, content="1" if text == "0" else "0")

    def _same_with(self, i: int, **fields: Any) -> bool:
        """Returns whether the text stays the same if message i gets these fields.

        A field of None is removed from the message.
        """
        message = {
            name: value for name, value in (self.messages[i] | fields).items() if value is not None
        }
        return self._same([*self.messages[:i], message, *self.messages[i + 1 :]], self.tools)

    def _same(self, messages: Messages, tools: list[dict] | None) -> bool:
        try:
            return self.render(messages, tools=tools) == self.text
        except UserError:
            return False


def is_said(message: Mapping[str, Any]) -> bool:
    """Returns whether a message of the assistant has a text, a tool call or reasoning."""
    return bool(
        message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
    )


def _is_thought_alone(message: Mapping[str, Any]) -> bool:
    return (
        "reasoning_content" in message
        and not message["content"].strip()
        and not message.get("tool_calls")
    )


def _name_of(tool: dict) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return repr(name) if isinstance(name, str) else f"one of type {tool.get('type')!r}"


def _dense(text: str) -> str:
    """Removes all white space from a text."""
    return "".join(text.split())
