"""Texts to token ids and character spans, where only what the package itself puts in can be a special token."""

import json
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.errors import UserError

SPECIAL = "\uffff"  # stands before the name of a special token; no character of any text (Unicode noncharacter)
BREAK = "\ufdd0"  # stands between the characters of a special token's name that is only text
RESERVED = SPECIAL + BREAK + "\ufdd1\ufdd2"  # noncharacters this package uses; in a user's text they become U+FFFD
_REPLACED = dict.fromkeys(map(ord, RESERVED), "\ufffd")


def clean(text: str) -> str:
    """A user's text without the noncharacters that have a meaning here."""
    return text.translate(_REPLACED)


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts in which a special token is found only if it is written with ``special()``.

    Text that merely looks like a special token stays text, whatever the kind of tokenizer: the special tokens of a copy of
    the tokenizer are given names that no text can hold, under the same ids.
    """

    backend: Tokenizer
    eos_token: str
    eos_id: int
    names: tuple[str, ...]  # of the special tokens

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TextEncoder":
        """The encoder of a tokenizer. Raises UserError for one without character offsets."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{type(tokenizer).__name__} gives no character offsets: a fast one (tokenizer.json) is needed")
        backend, names = _renamed(tokenizer.backend_tokenizer.to_str())
        return cls(backend, tokenizer.eos_token, tokenizer.eos_token_id, names)

    def special(self, name: str) -> str:
        """The special token of this name, as it is written in a text to encode."""
        return SPECIAL + name

    @cached_property
    def _names(self) -> re.Pattern:
        names = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True))
        return re.compile(f"(?:{names})(?!{BREAK})" if names else "(?!)")

    def without_specials(self, text: str) -> str:
        """A text in which ``with_specials`` finds no special token's name."""
        return self._names.sub(lambda match: "".join(character + BREAK for character in match[0]), text)

    def with_specials(self, text: str) -> str:
        """A text in which every special token's name means the token, but for those that ``without_specials`` broke."""
        return self._names.sub(lambda match: SPECIAL + match[0], text).replace(BREAK, "")

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character spans [start, end) of every text; tokens that the tokenizer itself adds have the span (0, 0).

        An end-of-sequence token that the tokenizer adds is left out: what ends a text is written in it.
        """
        rows = []
        for encoding in self.backend.encode_batch(texts, add_special_tokens=add_special_tokens):
            ids, spans = encoding.ids, encoding.offsets
            closed = add_special_tokens and ids and ids[-1] == self.eos_id and spans[-1] == (0, 0)
            rows.append((ids[:-1], spans[:-1]) if closed else (ids, spans))
        return rows

    def identity(self) -> str:
        """All that decides ids and spans."""
        return f"{self.backend.to_str()}\n{self.eos_id}"


@lru_cache(maxsize=4)  # seconds for a large vocabulary
def _renamed(tokenizer: str) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer of this JSON with other names for its special tokens, and what they were called."""
    state = json.loads(tokenizer)
    names = [token["content"] for token in state["added_tokens"] if token["special"]]
    renamed = {name: SPECIAL + name for name in names}
    for token in state["added_tokens"]:
        if token["special"]:  # found wherever it is written
            token |= {"content": renamed[token["content"]], "single_word": False, "normalized": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:  # a unigram model: pairs of a piece and its score
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:  # the names are no longer in any merge
        model["merges"] = [pair for pair in model["merges"] if renamed.keys().isdisjoint([*pair, "".join(pair)])]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    state["truncation"] = state["padding"] = None
    _keep_spaces(state["post_processor"])
    return Tokenizer.from_str(json.dumps(state)), tuple(names)


def _keep_spaces(post_processor: dict | None) -> None:
    """Has a token's span hold its spaces: without them, those of the prompt would look like the response's."""
    for step in (post_processor or {}).get("processors", [post_processor] if post_processor else []):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
