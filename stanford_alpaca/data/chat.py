"""Renders conversations with a tokenizer's chat template, and finds what the assistant writes.

Exactly those characters are trained: from the end of the generation prompt to the end of the turn,
with reasoning, tool calls and the end-of-turn token. The template need not mark them, see
``spans.py``. If it does, with ``{% generation %}``, its marks decide. An end-of-turn token that
the marks leave out is trained too.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stanford_alpaca.data.encode import TextEncoder, clean
from stanford_alpaca.data.left_out import LeftOut, is_said
from stanford_alpaca.data.messages import REASONING, Messages, more_of
from stanford_alpaca.data.prompts import Rendered, as_messages, text_note
from stanford_alpaca.data.sandbox import check_runs
from stanford_alpaca.data.spans import (
    OPEN,
    Marked,
    Span,
    find_spans,
    marked_text,
    shared_length,
    token_pattern,
)
from stanford_alpaca.errors import UserError, first_line

MARKED_BY_AUTHOR = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION: dict[str, Any] = {"role": "user", "content": "a"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "b"}
PROBED = ("Probe of a question.", "Probe of an answer.")
CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "f", "arguments": {"k": "v"}},
}
CALLING: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL: dict[str, Any] = {
    "name": "probed",
    "description": "d",
    "parameters": {"type": "object", "properties": {}},
}


PARTS = [{**QUESTION, "content": [{"type": "text", "text": "a"}]}]
SYSTEM = {"role": "system", "content": "s"}
# what a template is tried with before it is used
TRIED = ([QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION], [QUESTION, CALLING], PARTS)
MORE = {"tools": [{"type": "function", "function": TOOL}], "add_generation_prompt": True}


class Conversation(NamedTuple):
    """A record in the form that a template takes."""

    messages: Messages
    tools: list[dict] | None
    weights: list[float]  # one per message; only those of the assistant are used
    notes: list[str]  # see ``Rendered``


class ChatTemplate:
    """Renders conversations with a chat template. The template writes all special tokens itself.

    If the template refuses a system message (Gemma's does) or leaves it out, the message is put
    before the first question.

    Attributes:
        endings: the tokens that end a turn: the one that ends an answer and, if it is another one,
            the one that ends a tool call.
        cues: the texts that ask the assistant to write. The first is the generation prompt, empty
            if the template has none. The others are what it becomes if the template is told that
            the assistant should think, or should not.
    """

    def __init__(
        self,
        template: str,
        tokenizer: PreTrainedTokenizerBase,
        encoder: TextEncoder,
        for_tools: str | None = None,
    ):
        self.template, self.encoder = template, encoder
        self.names = tokenizer.special_tokens_map
        check_runs(template, [{"conversations": [each], **self.names, **MORE} for each in TRIED])
        self.wants_parts = False
        self.wants_parts = self._wants_parts()
        self.by_author = bool(MARKED_BY_AUTHOR.search(template))
        self.added = token_pattern(
            [token.content for token in tokenizer.added_tokens_decoder.values()]
        )
        self.writes_arguments = self._writes_arguments()
        self.takes_bare_tools = TOOL["name"] in (self._probe([QUESTION], tools=[TOOL]) or "")
        self.endings, within = self._endings()
        self.end_of_turn = token_pattern([*self.endings, within, encoder.eos_token or ""])
        self.cues = self._cues()
        self.takes_system = self._takes_system()
        self.tags = self.encoder.tags - self._structure()
        self.for_tools = ChatTemplate(for_tools, tokenizer, encoder) if for_tools else None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder) -> "ChatTemplate":
        """Returns the tokenizer's template.

        If the tokenizer has several named templates, ``default`` is used, and ``tool_use`` for
        records with tools.

        Raises:
            UserError: the tokenizer has only named templates, and none is ``default``.
        """
        templates = named_templates(tokenizer)
        if "default" not in templates:
            raise UserError(
                f"the tokenizer has chat templates named {', '.join(templates)}, and none is the "
                "default: choose one with --chat_template NAME in training, or use "
                "--prompt_template alpaca"
            )
        return cls(templates["default"], tokenizer, encoder, templates.get("tool_use"))

    # ---- what training and generation call -----------------------------------------------------

    def adds_special_tokens(self, text: str) -> bool:
        """Returns False: the template has already written the special tokens."""
        return False

    def render(self, record: Mapping) -> Rendered:
        """Returns the text up to the last answer, and the spans that the assistant writes.

        Raises:
            UserError: the template refuses the conversation, leaves out a tool, a call, a result
                or an answer, or hides where the turns begin and end.
        """
        if self.for_tools and more_of(record).get("tools"):
            return self.for_tools.render(record)
        said = self._prepared(record)
        messages = list(said.messages)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            return Rendered("", [], [])
        text, blocks = self._rendered(
            messages, tools=said.tools, return_assistant_tokens_mask=self.by_author
        )
        left_out = LeftOut(self._text, messages, said.tools, text)
        found = self._marked(messages, said.tools)
        written = found.ends if found else {}
        left_out.check(written)
        if self.by_author:
            spans, notes = self._by_author(messages, said, text, blocks)
        else:
            render = partial(self._text, tools=said.tools)
            spans, notes = (
                find_spans(render, messages, text, self.cues, self.added, self.end_of_turn),
                [],
            )
        left_out.check_trained(spans, self.end_of_turn)
        notes = [*said.notes, *notes, *left_out.notes(spans, written)]
        if spans:
            notes += self._out_of_place(messages, said, text, spans[-1], found)
        if spans and spans[-1].message == len(messages) - 1 and not self._is_ended(text, spans[-1]):
            end = spans[-1].end
            # otherwise nothing teaches the model to stop
            text = text[:end] + self.encoder.eos_token
            spans[-1] = spans[-1]._replace(end=len(text))
        return self._with_specials(
            text, spans, [said.weights[span.message] for span in spans], notes
        )

    def prompt(self, record: Mapping) -> str:
        """Returns the text that generation continues.

        It is the conversation without its last answer, followed by the generation prompt.
        """
        if self.for_tools and more_of(record).get("tools"):
            return self.for_tools.prompt(record)
        said = self._prepared(record)
        messages = list(said.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return self._with_specials(
            self._text(messages, tools=said.tools, add_generation_prompt=True), [], [], []
        ).text

    # ---- spans ---------------------------------------------------------------------------------

    def _by_author(
        self, messages: Messages, said: Conversation, text: str, blocks: list[tuple[int, int]]
    ) -> tuple[list[Span], list[str]]:
        """Returns the spans that the template marks, and notes about them.

        Adjacent blocks of one answer are joined. An end-of-turn token that follows a block joins
        its span.
        """
        spans: list[Span] = []
        for (start, end), owner in zip(
            blocks, self._owners(messages, said, text, blocks), strict=True
        ):
            if not is_said(messages[owner]):
                continue
            if spans and spans[-1].end == start and spans[-1].message == owner:
                start = spans.pop().start
            spans.append(Span(start, end, owner))
        left_out = False
        for k, span in enumerate(spans):
            following = spans[k + 1].start if k + 1 < len(spans) else len(text)
            space = len(text) - len(text[span.end :].lstrip())
            closing = (
                None
                if self._is_ended(text, span)
                else self.end_of_turn.match(text, space, following)
            )
            if closing:
                spans[k], left_out = span._replace(end=closing.end()), True
        note = (
            "the template's {% generation %} marks leave the end-of-turn token out: "
            "it is trained too"
        )
        return spans, [note] if left_out else []

    def _owners(
        self, messages: Messages, said: Conversation, text: str, blocks: list[tuple[int, int]]
    ) -> list[int]:
        """Returns the index of the answer that each block belongs to.

        It is the last answer whose text begins in the block or before it. If the template hides
        where the texts are, there has to be one block for each answer.

        Raises:
            UserError: the blocks cannot be assigned to answers.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for marked in (lambda message: True, lambda message: message["role"] == "assistant"):
            found = self._marked(messages, said.tools, marked)
            if found is None or found.text != text:
                continue
            written = found.begins.keys() | found.ends.keys()
            places = {
                i: min(of[i] for of in (found.begins, found.ends) if i in of)
                for i in answers
                if i in written
            }
            if places:
                first = min(places, key=places.__getitem__)
                return [
                    max((i for i, place in places.items() if place <= end), default=first)
                    for _, end in blocks
                ]
        if len(blocks) != len(answers):
            raise UserError(
                "the chat template hides which answers its {% generation %} marks are of"
            )
        return answers

    def _marked(
        self,
        messages: Messages,
        tools: list[dict] | None,
        marked: Callable[[dict], bool] = lambda message: True,
        **options: bool,
    ) -> Marked | None:
        """Returns ``marked_text``, or None if the template refuses the marks."""
        try:
            return marked_text(partial(self._text, tools=tools), messages, marked, **options)
        except UserError:
            return None

    def _is_ended(self, text: str, span: Span) -> bool:
        """Returns whether the span ends with an end-of-turn token."""
        last = next(reversed(list(self.end_of_turn.finditer(text, span.start, span.end))), None)
        return last is not None and not text[last.end() : span.end].strip()

    def _out_of_place(
        self, messages: Messages, said: Conversation, text: str, last: Span, found: Marked | None
    ) -> list[str]:
        """Returns a note if the last answer does not follow the generation prompt.

        Generation continues that prompt, so it would write the answer in another place.
        """
        before = len(messages) - 2
        if last.message != before + 1 or before < 0 or messages[before]["role"] == "assistant":
            return []
        asked = self._marked(messages[:-1], said.tools, add_generation_prompt=True)
        if asked is None or found is None or found.text != text:
            return []
        if before not in asked.ends.keys() & found.ends.keys():
            return []
        prompt, written = asked.text[asked.ends[before] :], text[found.ends[before] :]
        start = last.start - found.ends[before]
        if written.startswith(prompt) and not written[len(prompt) : start].strip():
            return []
        return [
            f"the answer does not follow the generation prompt {prompt.lstrip()!r}, "
            "which is what generation continues"
        ]

    # ---- texts ---------------------------------------------------------------------------------

    def _prepared(self, record: Mapping) -> Conversation:
        """Returns the conversation in the form that the template takes.

        The names of special tokens in it are escaped. A system message that the template does not
        take is moved to the first question.

        Raises:
            UserError: a field is nested too deep.
        """
        try:
            return self._read(record)
        except RecursionError:
            raise UserError(
                "a field of the record is nested too deep; mend the record or take it out"
            ) from None

    def _read(self, record: Mapping) -> Conversation:
        kept: dict[str, None] = {}
        parse = self.encoder.reading == "parse"

        def hidden(value: Any, tags: frozenset[str] = frozenset()) -> Any:
            """Escapes the names of special tokens in all strings of a value, except ``tags``."""
            if isinstance(value, dict):
                return {hidden(name): hidden(item, tags) for name, item in value.items()}
            if isinstance(value, list):
                return [hidden(item, tags) for item in value]
            if not isinstance(value, str) or parse:
                return clean(value) if isinstance(value, str) else value
            kept.update(
                dict.fromkeys(name for name in self.encoder.specials_in(value) if name not in tags)
            )
            return self.encoder.without_specials(clean(value), tags)

        messages, weights = [], []
        for message in as_messages(record):
            more = more_of(message)
            weights.append(more.pop("weight", 1.0))
            tags = self.tags if message["role"] == "assistant" else frozenset()
            fields = hidden({"content": message["content"], **more}, tags)
            messages.append({"role": message["role"], **self._for_template(fields)})
        tools = hidden([self._as_taken(tool) for tool in more_of(record).get("tools", ())]) or None
        notes = text_note(list(kept))
        if (
            messages
            and messages[0]["role"] == "system"
            and not self.takes_system
            and len(messages) > 1
        ):
            system, first, *others = messages
            notes.append(
                "the template takes no system message: it is put before the question, "
                "as it has to be when served"
            )
            if first["role"] != "user":  # an answer must hold nothing but the assistant's words
                return Conversation(
                    [{**system, "role": "user"}, first, *others], tools, weights, notes
                )
            first = {**first, "content": f"{system['content']}\n\n{first['content']}"}
            return Conversation([first, *others], tools, weights[1:], notes)
        return Conversation(messages, tools, weights, notes)

    def _for_template(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of a message under the names, and in the form, that templates read."""
        if "reasoning_content" in fields:
            fields |= dict.fromkeys(REASONING[:2], fields["reasoning_content"])
        if fields.get("tool_calls") and not self.writes_arguments:
            fields["tool_calls"] = [_with_text_arguments(call) for call in fields["tool_calls"]]
        return fields

    def _as_taken(self, tool: dict) -> dict:
        """Returns a tool in the form that the template reads.

        Some templates need a tool whose name is at its top level moved under ``function``.
        """
        bare = not self.takes_bare_tools and "function" not in tool and "name" in tool
        return (
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
            if bare
            else tool
        )

    def _with_specials(
        self, text: str, spans: list[Span], weights: list[float], notes: list[str]
    ) -> Rendered:
        """Marks the template's special tokens for the encoder, and moves the spans along.

        Names that were escaped in the fields of the record become plain text again.
        """
        written, moved, done = "", [], 0
        for start, end, _ in spans:
            written += self.encoder.with_specials(text[done:start])
            begin = len(written)
            written += self.encoder.with_specials(text[start:end])
            moved.append((begin, len(written)))
            done = end
        return Rendered(written + self.encoder.with_specials(text[done:]), moved, weights, notes)

    def _text(self, messages: Messages, **options: Any) -> str:
        return self._rendered(messages, **options)[0]

    def _rendered(self, messages: Messages, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        if self.wants_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        try:
            texts, indices = render_jinja_template(
                [messages], chat_template=self.template, **options, **self.names
            )
            texts[0].encode()  # raises for half a surrogate pair, which no tokenizer takes
        except Exception as error:  # a template may do anything, as divide by zero
            raise UserError(
                f"the chat template refuses a conversation: {first_line(error)}"
            ) from None
        return texts[0], indices[0] if indices else []

    # ---- what the template does ----------------------------------------------------------------

    def _wants_parts(self) -> bool:
        """Returns whether the template writes texts only if they are lists of parts.

        The templates of Idefics3 and LLaVA lose a text that is a string.
        """

        def is_written(messages: Messages) -> bool:
            text = self._probe(messages) or ""
            return all(word in text for word in PROBED)

        asked = [
            {"role": role, "content": word}
            for role, word in zip(("user", "assistant"), PROBED, strict=True)
        ]
        parts = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in asked
        ]
        return not is_written(asked) and is_written(parts)

    def _takes_system(self) -> bool:
        return OPEN in (self._probe([{"role": "system", "content": OPEN}, QUESTION]) or "")

    def _writes_arguments(self) -> bool:
        """Returns whether the template turns an object of arguments into JSON.

        If it does not, it has to get JSON.
        """
        text = self._probe([QUESTION, CALLING])
        as_json = self._probe([QUESTION, {**CALLING, "tool_calls": [_with_text_arguments(CALL)]}])
        return as_json is None or (
            text is not None and str(CALL["function"]["arguments"]) not in text
        )

    def _endings(self) -> tuple[list[str], str]:
        """Returns the added tokens that end an answer and a call, and the one that ends any turn.

        The last one ends turns of the user and of the assistant within a conversation. It is ""
        if there is none. Other tokens that the template does not write are left out.

        Some templates end a conversation differently from a turn within it. The token that ends an
        answer is then that of the turn, if the end of the conversation has it too (Phi-3).
        Otherwise it is that of the end (gpt-oss).
        """
        answered = [QUESTION, ANSWER, QUESTION]
        last, within, call = (
            self._tail(messages) for messages in (answered[:2], answered, [QUESTION, CALLING])
        )
        both = self.added.findall(last[: shared_length(last, within, self.added)])
        of_all = self.added.findall(
            within[: shared_length(within, self._tail(answered, of=0), self.added)]
        )
        names = both[-1:] or self.added.findall(last)[:1]
        names += [
            name
            for name in self.added.findall(call)[-1:]
            if not name.startswith("</") or name == self.encoder.eos_token
        ]
        return list(dict.fromkeys(names)), (of_all or [""])[0]

    def _tail(self, messages: Messages, of: int = 1) -> str:
        """Returns what the template writes after the text of message ``of``.

        Returns "" if the template refuses the conversation.
        """
        try:
            text, _, ends = marked_text(self._text, messages)
        except UserError:
            return ""
        return text[ends[of] :] if of in ends else ""

    def _cues(self) -> list[str]:
        plain, cues = self._probe([QUESTION]), []
        for asked in (
            {},
            *({name: value} for name in ("enable_thinking", "thinking") for value in (True, False)),
        ):
            prompt = self._probe([QUESTION], add_generation_prompt=True, **asked)
            cues.append(
                ""
                if plain is None or prompt is None
                else prompt[shared_length(prompt, plain, self.added) :]
            )
        return list(dict.fromkeys(cues))

    def _structure(self) -> set[str]:
        """Returns the special tokens that the template writes around turns.

        In the text of an answer, their names never mean the tokens.
        """
        asked = (
            self._probe([{"role": "system", "content": "s"}, QUESTION])
            or self._probe([QUESTION])
            or ""
        )
        return {*self.encoder.specials_in(asked), *self.endings}

    def _probe(self, messages: Messages, **options: Any) -> str | None:
        try:
            return self._text(messages, **options)
        except UserError:
            return None


def _with_text_arguments(call: dict) -> dict:
    function = call["function"]
    return {
        **call,
        "function": {
            **function,
            "arguments": json.dumps(function["arguments"], ensure_ascii=False),
        },
    }


def named_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns a tokenizer's chat templates by name. A single template is named ``default``."""
    templates = tokenizer.chat_template or {}
    return templates if isinstance(templates, dict) else {"default": templates}


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of the tokens that end a response.

    These are the end-of-sequence token and, if the tokenizer has a chat template, the tokens that
    end a turn. Of several templates only ``default`` counts, or all if there is no default.
    """
    named = named_templates(tokenizer)
    used = [named["default"]] if "default" in named else list(named.values())
    templates = [ChatTemplate(template, tokenizer, TextEncoder.of(tokenizer)) for template in used]
    endings = [ending for template in templates for ending in template.endings]
    return list(
        dict.fromkeys([tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, endings)])
    )
