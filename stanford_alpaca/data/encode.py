"""Encodes texts to token ids and character spans.

Only names that this package marks become special tokens. Look-alikes in a user's text stay text.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.errors import UserError

# marks the name after it as a special token; a Unicode noncharacter, so it is part of no text
SPECIAL = "\uffff"
# escapes the name of a special token that is only text, by standing after each of its characters
ESCAPE = "\ufdd0"
# the noncharacters that this package uses; in a user's text they become U+FFFD
RESERVED = SPECIAL + ESCAPE + "\ufdd1\ufdd2"
# what the name of a special token in a record means: its characters, or the token
READINGS = ("text", "parse")
# the roles of tokens that never mark up an answer
USUAL = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# found in the names of special tokens that mark reasoning
THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)
_REPLACED = dict.fromkeys(map(ord, RESERVED), "\ufffd")


def clean(text: str) -> str:
    """Replaces the noncharacters in a user's text that have a meaning in this package."""
    return text.translate(_REPLACED)


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts in which a special token is found only if it is written with ``special()``.

    Text that merely looks like a special token stays text, whatever the kind of tokenizer. To this
    end the encoder uses a copy of the tokenizer. The special tokens of the copy have names that no
    text can hold, and the same ids.

    Attributes:
        names: the names of the special tokens.
        tags: the special tokens that mark up an answer: pairs such as ``<think>`` and
            ``</think>``, and those whose names speak of reasoning. In answers they always mean the
            tokens.
        reading: one of ``READINGS``: what the other names mean in the fields of a record.
    """

    backend: Tokenizer
    eos_token: str
    eos_id: int
    names: tuple[str, ...]
    tags: frozenset[str] = frozenset()
    reading: str = "text"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, reading: str = "text") -> "TextEncoder":
        """Returns a tokenizer's encoder. Raises UserError for one without character offsets."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets: "
                "a fast one (tokenizer.json) is needed"
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
        """Returns the special token of this name as it is written in a text to encode."""
        return SPECIAL + name

    @cached_property
    def _names(self) -> re.Pattern:
        names = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True))
        return re.compile(f"(?:{names})(?!{ESCAPE})" if names else "(?!)")

    def without_specials(self, text: str, keep: Collection[str] = ()) -> str:
        """Escapes the names of special tokens in a text, except those to ``keep``.

        ``with_specials`` does not find an escaped name.
        """

        def broken(match: re.Match) -> str:
            return (
                match[0]
                if match[0] in keep
                else "".join(character + ESCAPE for character in match[0])
            )

        return self._names.sub(broken, text)

    def with_specials(self, text: str, only: Collection[str] | None = None) -> str:
        """Marks every name of a special token in a text (or ``only`` these) as the token.

        Names that ``without_specials`` escaped become plain text again.
        """

        def meant(match: re.Match) -> str:
            return SPECIAL + match[0] if only is None or match[0] in only else match[0]

        return self._names.sub(meant, text).replace(ESCAPE, "")

    def specials_in(self, text: str) -> list[str]:
        """Returns the names of special tokens in a text, each once."""
        return list(dict.fromkeys(self._names.findall(text)))

    def meant(self, answer: bool) -> Collection[str]:
        """Returns the names that mean tokens in a field of a record. Tags do in any ``answer``."""
        return self.names if self.reading == "parse" else self.tags if answer else ()

    def field(self, text: str, answer: bool = False) -> tuple[str, list[str]]:
        """Returns a user's text as it is written in a text to encode.

        Also returns the names of special tokens that stay text in it.
        """
        names, meant = self.specials_in(text), self.meant(answer)
        written = self.with_specials(clean(text), meant) if names else clean(text)
        return written, [name for name in names if name not in meant]

    @cached_property
    def first(self) -> str:
        """The name of the token that the tokenizer puts before a text, or ""."""
        encoding = self.backend.encode("a", add_special_tokens=True)
        before = encoding.offsets[0] == (0, 0) and len(encoding.ids) > 1
        return encoding.tokens[0].removeprefix(SPECIAL) if before else ""

    def begins(self, text: str) -> bool:
        """Returns whether a written text already begins with the token ``first``."""
        return bool(self.first) and text.startswith(self.special(self.first))

    def name_of(self, token_id: int) -> str:
        """Returns the name that the tokenizer has for a token."""
        return (self.backend.id_to_token(token_id) or "").removeprefix(SPECIAL)

    def __call__(
        self, texts: list[str], add_special_tokens: bool | list[bool] = True
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Returns the token ids and character spans [start, end) of every text.

        Tokens that the tokenizer itself adds have the span (0, 0). An end-of-sequence token that
        it adds is dropped, because a text holds the token that ends it.

        Args:
            add_special_tokens: one value for all texts, or one for each.
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
        """The ids of special tokens that include the white space around them (Phi-3's)."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(
            number for number, token in added if token.special and (token.lstrip or token.rstrip)
        )

    def _without_space(self, text: str, token_id: int, span: tuple[int, int]) -> tuple[int, int]:
        """Returns the span of a token's name alone.

        Otherwise white space after a turn would put a part of its end-of-turn token outside the
        trained span, and the token would not be trained.
        """
        if token_id not in self._stripping or span == (0, 0):
            return span
        written = text[span[0] : span[1]]
        return span[0] + len(written) - len(written.lstrip()), span[0] + len(written.rstrip())

    def identity(self) -> str:
        """Returns everything that decides ids and spans, for the keys of caches."""
        return f"{self.backend.to_str()}\n{self.eos_id}\n{sorted(self.tags)}\n{self.reading}"


def _tags(names: Collection[str]) -> set[str]:
    """Returns the names of special tokens that mark up an answer, see ``TextEncoder``."""
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


@lru_cache(maxsize=4)  # a large vocabulary takes seconds
def _renamed(tokenizer: str) -> tuple[Tokenizer, tuple[str, ...]]:
    """Returns the tokenizer of this JSON with its special tokens renamed, and their old names."""
    state = json.loads(tokenizer)
    names = [token["content"] for token in state["added_tokens"] if token["special"]]
    renamed = {name: SPECIAL + name for name in names}
    for token in state["added_tokens"]:
        if token["special"]:  # the options let it be found wherever it is written
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
    if "merges" in model:  # drop those that hold or make an old name
        model["merges"] = [
            pair for pair in model["merges"] if renamed.keys().isdisjoint([*pair, "".join(pair)])
        ]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    state["truncation"] = state["padding"] = None
    _keep_spaces(state["post_processor"])
    return Tokenizer.from_str(json.dumps(state)), tuple(names)


def _keep_spaces(post_processor: dict | None) -> None:
    """Makes the span of a token include its spaces.

    Otherwise a token that begins with a space of the prompt would seem to lie in the response.
    """
    for step in (post_processor or {}).get(
        "processors", [post_processor] if post_processor else []
    ):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
