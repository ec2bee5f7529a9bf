"""A tokenizer's own chat template: conversations to texts, and exactly which characters the assistant has to write.

Trained is what the model writes when it is its turn: from the end of the generation prompt to the end of the turn, the
end-of-turn token included, whether or not the template marks it. A template with ``{% generation %}`` marks is taken at its
word. Otherwise noncharacters go around every message's text, the template is rendered, and they show where it put each one.
"""

import re
from collections.abc import Callable, Mapping

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stanford_alpaca.data.encode import TextEncoder, clean
from stanford_alpaca.data.prompts import Messages, Rendered, as_messages
from stanford_alpaca.errors import UserError, first_line

OPEN, CLOSE = "\ufdd1", "\ufdd2"  # around the numbers of the marks
MARK = re.compile(f"{OPEN}([<>])(\\d+){CLOSE}")  # "<3": the text of message 3 begins, ">3": it has ended
MARKED_BY_AUTHOR = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template. The template writes all special tokens itself.

    A system message that the template refuses (Gemma's does) or leaves out goes before the first question.
    """

    add_special_tokens = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder):
        self.template, self.encoder = tokenizer.get_chat_template(), encoder
        self.names = tokenizer.special_tokens_map
        self.by_author = bool(MARKED_BY_AUTHOR.search(self.template))
        self.ending = self._ending([token.content for token in tokenizer.added_tokens_decoder.values()])
        self.end_of_turn = _any_of([name for name in (self.ending, encoder.eos_token) if name])
        self.cue = self._cue()
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

    # ---- spans ---------------------------------------------------------------------------------------------------------

    def _by_author(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        text, indices = self._rendered(messages, return_assistant_tokens_mask=True)
        spans = [(start, end) for start, end in indices]
        answers = [message for message in messages if message["role"] == "assistant"]
        if len(spans) == len(answers):
            spans = [span for span, answer in zip(spans, answers, strict=True) if answer["content"].strip()]
        return text, spans

    def _by_marks(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        text = self._text(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
        for marked in (lambda message: True, lambda message: message["role"] == "assistant" and message["content"].strip()):
            # a template may look at the ends of other messages' texts (Qwen3's does), where a mark would be in the way
            written, begins, ends = self._marked(messages, marked)
            if written == text:
                break
        else:
            raise UserError("the chat template does not write the texts of the messages as they are")
        spans = []
        for i in answers:
            start = self._start(i, text, begins, ends, self._tail(messages[:i], marked))
            if start is None:
                raise UserError(f"the chat template hides where message {i + 1} begins or ends")
            closing = self.end_of_turn.match(text, ends[i])
            spans.append((start, closing.end() if closing else ends[i]))
        return text, spans

    def _start(self, i: int, text: str, begins: dict[int, int], ends: dict[int, int], tail: str | None) -> int | None:
        """Where the model starts to write message i: behind the generation prompt, as far as the text has it.

        Prompts are compared from the end of the last text before: what a template writes further up may differ between a
        prompt and the whole (a system prompt that moves, thoughts that are dropped).
        """
        if i not in ends:
            return None
        limit = begins.get(i, ends[i])
        before = ends.get(max((j for j in ends if j < i and ends[j] <= limit), default=-1), 0)  # of the last text before
        between = text[before:limit]
        whole = tail if tail is not None and text.startswith(tail, before) and before + len(tail) <= ends[i] else None
        if whole is not None and whole.endswith(self.cue):
            return before + len(whole)
        if self.cue and self.cue in between:  # the prompt closes the message before otherwise, or has no cue there
            return before + between.rindex(self.cue) + len(self.cue)
        if whole is not None:
            return before + len(whole)
        shared = _shared(tail or "", between)
        if i in begins and between[shared:].strip():  # something else stands there, which is not the model's
            return begins[i]
        return before + shared if tail is not None or i in begins else None

    def _tail(self, history: Messages, marked: Callable) -> str | None:
        """What the prompt for an answer to ``history`` has behind the text of the last message, if the template takes it."""
        try:
            prompt, _, ends = self._marked(history, marked, add_generation_prompt=True)
        except UserError:
            return None
        return prompt[ends[max(ends)] :] if ends else prompt

    def _is_ended(self, text: str, span: tuple[int, int]) -> bool:
        """Whether a token closes the turn, within its span or, where the template's author leaves it out, behind it."""
        last = next(reversed(list(self.end_of_turn.finditer(text, *span))), None)
        return bool(self.end_of_turn.match(text, span[1]) or (last and not text[last.end() : span[1]].strip()))

    def _marked(
        self, messages: Messages, marked: Callable = lambda message: True, **options
    ) -> tuple[str, dict[int, int], dict[int, int]]:
        """The rendered text, and where in it the texts of the ``marked`` messages begin (the assistant's) and end."""
        contents = []
        for i, message in enumerate(messages):
            content = message["content"]
            core = content.strip()
            before = content[: len(content) - len(content.lstrip())] if core else content
            begin = f"{OPEN}<{i}{CLOSE}" if message["role"] == "assistant" else ""
            with_marks = f"{before}{begin}{core}{OPEN}>{i}{CLOSE}{content[len(before) + len(core) :]}"
            contents.append({**message, "content": with_marks if marked(message) else content})
        pieces = MARK.split(self._text(contents, **options))
        text = pieces[0]
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for kind, number, piece in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            (begins if kind == "<" else ends)[int(number)] = len(text)
            text += piece
        return text, begins, ends

    # ---- texts ---------------------------------------------------------------------------------------------------------

    def _prepared(self, record: Mapping) -> Messages:
        """The messages with special tokens' names broken, and the system message where the template takes it."""
        messages = [
            {"role": message["role"], "content": self.encoder.without_specials(clean(message["content"]))}
            for message in as_messages(record)
        ]
        if messages and messages[0]["role"] == "system" and not self.takes_system and len(messages) > 1:
            system, first, *others = messages
            if first["role"] != "user":  # the assistant's words must stay its own
                return [{**system, "role": "user"}, first, *others]
            return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
        return messages

    def _with_specials(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """The template's special tokens written for the encoder, the users' names whole again; the spans follow."""
        written, moved, done = "", [], 0
        for start, end in spans:
            written += self.encoder.with_specials(text[done:start])
            begin = len(written)
            written += self.encoder.with_specials(text[start:end])
            moved.append((begin, len(written)))
            done = end
        return Rendered(written + self.encoder.with_specials(text[done:]), moved)

    def _text(self, messages: Messages, **options) -> str:
        return self._rendered(messages, **options)[0]

    def _rendered(self, messages: Messages, **options) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, indices = render_jinja_template([messages], chat_template=self.template, **options, **self.names)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template refuses a conversation: {first_line(error)}") from None
        return texts[0], indices[0] if indices else []

    # ---- what the template does ----------------------------------------------------------------------------------------

    def _takes_system(self) -> bool:
        try:
            return OPEN in self._text([{"role": "system", "content": OPEN}, QUESTION])
        except UserError:
            return False

    def _ending(self, added: list[str]) -> str | None:
        """The added token that ends the assistant's turn, if the template writes one."""
        try:
            text, _, ends = self._marked([QUESTION, ANSWER])
        except UserError:  # a template that takes no such conversation
            return None
        closing = _any_of(added).match(text, ends[1]) if 1 in ends else None
        return closing[0].strip() if closing else None

    def _cue(self) -> str:
        """What asks the assistant to write: the generation prompt, empty if the template knows none."""
        try:
            plain, asked = self._text([QUESTION]), self._text([QUESTION], add_generation_prompt=True)
        except UserError:
            return ""
        return asked[_shared(plain, asked) :]


def _shared(one: str, other: str) -> int:
    """The number of characters with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _any_of(names: list[str]) -> re.Pattern:
    """Whitespace and one of the names."""
    return re.compile(r"\s*(?:" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")" if names else "(?!)")


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the end-of-sequence token and, with a chat template, the one that ends a turn."""
    stops = [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        ending = ChatTemplate(tokenizer, TextEncoder.of(tokenizer)).ending
        if ending is not None:
            stops.append(tokenizer.convert_tokens_to_ids(ending))
    return list(dict.fromkeys(stops))
