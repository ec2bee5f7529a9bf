"""A tokenizer's own chat template: conversations to texts, and exactly which characters the assistant has to write.

Trained is what the model writes when it is its turn: from the end of the generation prompt to the end of the turn, the
end-of-turn token included, whether or not the template marks it. A template with ``{% generation %}`` marks is taken at its
word. Otherwise noncharacters go around every message's text, the template is rendered, and they show where it put each one.
"""

import re
from collections.abc import Mapping

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stanford_alpaca.data.encode import TextEncoder, clean
from stanford_alpaca.data.prompts import Messages, Rendered, as_messages
from stanford_alpaca.errors import UserError, first_line

BREAK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"  # breaks special tokens' names; around the numbers of the marks
MARK = re.compile(f"{OPEN}([<>])(\\d+){CLOSE}")  # "<3": the text of message 3 begins, ">3": it has ended
MARKED_BY_AUTHOR = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template. The template writes all special tokens itself.

    A system message that the template refuses (Gemma's does) goes before the first question.
    """

    add_special_tokens = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder):
        self.template, self.encoder = tokenizer.get_chat_template(), encoder
        self.names = tokenizer.special_tokens_map
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.end_of_turn = re.compile(r"\s*(?:" + "|".join(map(re.escape, added)) + ")") if added else re.compile("(?!)")
        self.by_author = bool(MARKED_BY_AUTHOR.search(self.template))
        self.takes_system = self._takes_system()

    # ---- what training and generation ask for --------------------------------------------------------------------------

    def render(self, record: Mapping) -> Rendered:
        """The text of a conversation up to its last answer, and the spans that the assistant writes.

        Raises:
            UserError: the template refuses the conversation, or does not let its turns be found.
        """
        messages = self._prepared(record)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            return Rendered("", [])
        text, spans = self._by_author(messages) if self.by_author else self._by_marks(messages)
        if spans and messages[-1]["content"].strip() and not self._is_ended(text, spans[-1]):
            text = text[: spans[-1][1]] + self.encoder.eos_token  # else nothing would teach the model to stop
            spans[-1] = (spans[-1][0], len(text))
        return self._with_specials(text, spans)

    def prompt(self, record: Mapping) -> str:
        """The text that generation continues: all but the last answer, and the generation prompt."""
        messages = self._prepared(record)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return self._with_specials(self._text(messages, add_generation_prompt=True), []).text

    def ending(self) -> str | None:
        """The special token that ends the assistant's turn, if the template writes one."""
        text, _, ends = self._marked([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        closing = self.end_of_turn.match(text, ends[1])
        return closing[0].strip() if closing else None

    # ---- spans ---------------------------------------------------------------------------------------------------------

    def _by_author(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        text, indices = self._rendered(messages, return_assistant_tokens_mask=True)
        spans = [(start, end) for start, end in indices]
        answers = [message for message in messages if message["role"] == "assistant"]
        if len(spans) == len(answers):
            spans = [span for span, answer in zip(spans, answers, strict=True) if answer["content"].strip()]
        return text, spans

    def _by_marks(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        text, begins, ends = self._marked(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
        if not answers:
            return text, []
        starts = {i: self._start(messages[:i], text, ends) for i in answers}
        last = answers[-1]
        # the prompt of an earlier turn may be written differently when it is the last (a system prompt that moves, say): then
        # what lies between prompt and answer is what lies there in the last turn
        lead = begins[last] - (starts[last] or begins[last]) if last in begins else 0
        spans = []
        for i in answers:
            start = starts[i]
            if start is None and i in begins:
                start = begins[i] - lead
            if start is None or i not in ends or start > ends[i]:
                raise UserError(f"the chat template hides where message {i + 1} begins or ends")
            closing = self.end_of_turn.match(text, ends[i])
            spans.append((start, closing.end() if closing else ends[i]))
        return text, spans

    def _start(self, history: Messages, text: str, ends: dict[int, int]) -> int | None:
        """Where the answer to ``history`` starts: after its generation prompt, as far as the whole text has it."""
        if not history:
            return None
        prompt = self._text(history, add_generation_prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            start = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
        return start if start >= ends.get(len(history) - 1, len(text) + 1) else None

    def _is_ended(self, text: str, span: tuple[int, int]) -> bool:
        """Whether a token closes the turn, within its span or, where the template's author leaves it out, behind it."""
        last = next(reversed(list(self.end_of_turn.finditer(text, *span))), None)
        return bool(self.end_of_turn.match(text, span[1]) or (last and not text[last.end() : span[1]].strip()))

    def _marked(self, messages: Messages) -> tuple[str, dict[int, int], dict[int, int]]:
        """The rendered text and where in it each message's text begins and ends, by its number."""
        marked = []
        for i, message in enumerate(messages):
            content = message["content"]
            core = content.strip()
            before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
            begin = f"{OPEN}<{i}{CLOSE}" if message["role"] == "assistant" else ""
            marked.append({**message, "content": f"{before}{begin}{core}{OPEN}>{i}{CLOSE}{after}" if core else content})
        pieces = MARK.split(self._text(marked))
        text = pieces[0]
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for kind, number, piece in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            (begins if kind == "<" else ends)[int(number)] = len(text)
            text += piece
        if text != self._text(messages):
            raise UserError("the chat template does not write the texts of the messages as they are")
        return text, begins, ends

    # ---- texts ---------------------------------------------------------------------------------------------------------

    def _prepared(self, record: Mapping) -> Messages:
        """The messages with special tokens' names broken, and the system message where the template takes it."""
        messages = [
            {"role": message["role"], "content": self.encoder.without_specials(clean(message["content"]), BREAK)}
            for message in as_messages(record)
        ]
        if messages and messages[0]["role"] == "system" and not self.takes_system and len(messages) > 1:
            system, first, *others = messages
            return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *others]
        return messages

    def _with_specials(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """The template's special tokens written for the encoder, the users' names whole again; the spans follow."""
        written, moved, done = "", [], 0
        for start, end in spans:
            written += self._written(text[done:start])
            begin = len(written)
            written += self._written(text[start:end])
            moved.append((begin, len(written)))
            done = end
        return Rendered(written + self._written(text[done:]), moved)

    def _written(self, text: str) -> str:
        return self.encoder.with_specials(text).replace(BREAK, "")

    def _text(self, messages: Messages, **options) -> str:
        return self._rendered(messages, **options)[0]

    def _rendered(self, messages: Messages, **options) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, indices = render_jinja_template([messages], chat_template=self.template, **options, **self.names)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template refuses a conversation: {first_line(error)}") from None
        return texts[0], indices[0] if indices else []

    def _takes_system(self) -> bool:
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        try:
            return "a" in self._text(messages)
        except UserError:
            return False


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the end-of-sequence token and, with a chat template, the one that ends a turn."""
    stops = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        try:
            ending = ChatTemplate(tokenizer, TextEncoder.of(tokenizer)).ending()
        except UserError:  # a template that takes no such conversation
            ending = None
        if ending is not None:
            stops.append(tokenizer.convert_tokens_to_ids(ending))
    return list(dict.fromkeys(stops))
