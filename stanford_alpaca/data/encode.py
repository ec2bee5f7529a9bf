"""Texts to token ids and character spans, where only what the package itself puts in can be a special token."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.errors import UserError

SPECIAL = "\uffff"  # stands before the name of a special token; no character of any text (Unicode noncharacter)
BREAK = "\ufdd0"  # stands between the characters of a special token's name that is only text
RESERVED = (
    SPECIAL + BREAK + "\ufdd1\ufdd2"
)  # noncharacters this package uses; in a user's text they become U+FFFD
READINGS = (
    "text",
    "parse",
)  # what the name of a special token in a record means: its characters, or the token
USUAL = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)  # they mark up no answer
THOUGHT = re.compile(
    "think|thought|reason", re.IGNORECASE
)  # in the name of a special token that marks reasoning
_REPLACED = dict.fromkeys(map(ord, RESERVED), "\ufffd")


def clean(text: str) -> str:
    """A user's text without the noncharacters that have a meaning here."""
    return text.translate(_REPLACED)


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts in which a special token is found only if it is written with ``special()``.

    Text that merely looks like a special token stays text, whatever the kind of tokenizer: the special tokens of a copy of
    the tokenizer are given names that no text can hold, under the same ids.

    Attributes:
        names: of the special tokens.
        tags: those that mark up an answer: pairs as ``<think>`` and ``</think>``, and what marks reasoning by its name. In
            answers they always mean the tokens.
        reading: one of ``READINGS``: what the names of the others mean in the fields of a record.
    """

    backend: Tokenizer
    eos_token: str
    eos_id: int
    names: tuple[str, ...]
    tags: frozenset[str] = frozenset()
    reading: str = "text"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, reading: str = "text") -> "TextEncoder":
        """The encoder of a tokenizer. Raises UserError for one without character offsets."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets: a fast one (tokenizer.json) is needed"
            )
        backend, names = _renamed(tokenizer.backend_tokenizer.to_str())
        named = {str(tokenizer.special_tokens_map.get(role)) for role in USUAL}
        return cls(
            backend,
            tokenizer.eos_token,
            tokenizer.eos_token_id,
            names,
            frozenset(_tags(names) - named),
            reading,
        )

    def special(self, name: str) -> str:
        """The special token of this name, as it is written in a text to encode."""
        return SPECIAL + name

    @cached_property
    def _names(self) -> re.Pattern:
        names = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True))
        return re.compile(f"(?:{names})(?!{BREAK})" if names else "(?!)")

    def without_specials(self, text: str, keep: Collection[str] = ()) -> str:
        """A text in which ``with_specials`` finds no special token's name but those to ``keep``."""

        def broken(match: re.Match) -> str:
            return (
                match[0]
                if match[0] in keep
                else "".join(character + BREAK for character in match[0])
            )

        return self._names.sub(broken, text)

    def with_specials(self, text: str, only: Collection[str] | None = None) -> str:
        """A text in which every special token's name (``only`` these) means the token, but for those that
        ``without_specials`` broke."""

        def meant(match: re.Match) -> str:
            return SPECIAL + match[0] if only is None or match[0] in only else match[0]

        return self._names.sub(meant, text).replace(BREAK, "")

    def specials_in(self, text: str) -> list[str]:
        """The names of special tokens that stand in a text, each once."""
        return list(dict.fromkeys(self._names.findall(text)))

    def meant(self, answer: bool) -> Collection[str]:
        """The names that mean tokens in a field of a record: in an ``answer`` tags always do."""
        return self.names if self.reading == "parse" else self.tags if answer else ()

    def field(self, text: str, answer: bool = False) -> tuple[str, list[str]]:
        """A user's text as it is written in a text to encode, and the names of special tokens that stay text in it."""
        names, meant = self.specials_in(text), self.meant(answer)
        written = self.with_specials(clean(text), meant) if names else clean(text)
        return written, [name for name in names if name not in meant]

    @cached_property
    def first(self) -> str:
        """The name of the token that the tokenizer puts before a text, or nothing."""
        encoding = self.backend.encode("a", add_special_tokens=True)
        before = encoding.offsets[0] == (0, 0) and len(encoding.ids) > 1
        return encoding.tokens[0].removeprefix(SPECIAL) if before else ""

    def begins(self, text: str) -> bool:
        """Whether a written text has that token already."""
        return bool(self.first) and text.startswith(self.special(self.first))

    def name_of(self, token_id: int) -> str:
        """A token as its tokenizer calls it."""
        return (self.backend.id_to_token(token_id) or "").removeprefix(SPECIAL)

    def __call__(
        self, texts: list[str], add_special_tokens: bool | list[bool] = True
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character spans [start, end) of every text; tokens that the tokenizer itself adds have the span (0, 0).

        An end-of-sequence token that the tokenizer adds is left out: what ends a text is written in it.

        Args:
            add_special_tokens: for all texts, or for each.
        """
        if isinstance(add_special_tokens, list):
            if len(set(add_special_tokens)) > 1:
                return [
                    self([text], add)[0]
                    for text, add in zip(texts, add_special_tokens, strict=True)
                ]
            add_special_tokens = add_special_tokens[:1] == [True]
        rows = []
        for text, encoding in zip(
            texts,
            self.backend.encode_batch(texts, add_special_tokens=add_special_tokens),
            strict=True,
        ):
            ids, spans = encoding.ids, encoding.offsets
            if self._stripping:
                spans = [self._without_space(text, *each) for each in zip(ids, spans, strict=True)]
            closed = add_special_tokens and ids and ids[-1] == self.eos_id and spans[-1] == (0, 0)
            rows.append((ids[:-1], spans[:-1]) if closed else (ids, spans))
        return rows

    @cached_property
    def _stripping(self) -> frozenset[int]:
        """The special tokens that take the white space around them (Phi-3's)."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(
            number for number, token in added if token.special and (token.lstrip or token.rstrip)
        )

    def _without_space(self, text: str, token_id: int, span: tuple[int, int]) -> tuple[int, int]:
        """The span of the name alone, so that white space behind the end of a turn does not take the end along."""
        if token_id not in self._stripping or span == (0, 0):
            return span
        written = text[span[0] : span[1]]
        return span[0] + len(written) - len(written.lstrip()), span[0] + len(written.rstrip())

    def identity(self) -> str:
        """All that decides ids and spans."""
        return f"{self.backend.to_str()}\n{self.eos_id}\n{sorted(self.tags)}\n{self.reading}"


def _tags(names: Collection[str]) -> set[str]:
    """Those of special tokens that mark up an answer: pairs as <think> and </think>, and marks of reasoning by their names."""
    closed = {
        name
        for name in names
        if name.startswith("<") and f"</{name[1:]}" in names and name != "<s>"
    }
    return (
        closed
        | {f"</{name[1:]}" for name in closed}
        | {name for name in names if THOUGHT.search(name)}
    )


@lru_cache(maxsize=4)  # seconds for a large vocabulary
def _renamed(tokenizer: str) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer of this JSON with other names for its special tokens, and what they were called."""
    state = json.loads(tokenizer)
    names = [token["content"] for token in state["added_tokens"] if token["special"]]
    renamed = {name: SPECIAL + name for name in names}
    for token in state["added_tokens"]:
        if token["special"]:  # found wherever it is written
            token |= {
                "content": renamed[token["content"]],
                "single_word": False,
                "normalized": False,
            }
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            renamed.get(piece, piece): number for piece, number in model["vocab"].items()
        }
    else:  # a unigram model: pairs of a piece and its score
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:  # the names are no longer in any merge
        model["merges"] = [
            pair for pair in model["merges"] if renamed.keys().isdisjoint([*pair, "".join(pair)])
        ]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    state["truncation"] = state["padding"] = None
    _keep_spaces(state["post_processor"])
    return Tokenizer.from_str(json.dumps(state)), tuple(names)


def _keep_spaces(post_processor: dict | None) -> None:
    """Has a token's span hold its spaces: without them, those of the prompt would look like the response's."""
    for step in (post_processor or {}).get(
        "processors", [post_processor] if post_processor else []
    ):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
