"""Another model's output embedding as the cost embedding, also across tokenizers."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

ROLES = (
    "eos",
    "bos",
    "unk",
    "pad",
)  # a token with several is matched by the first that the source has too
BEFORE = "a"  # a text to decode a token behind, so that its leading space shows
BREAK = "\n"  # a text to encode a token behind: pieces do not grow over it, and no space is put after it


@dataclass(frozen=True)
class Matches:
    """Where the rows come from."""

    exact: int = 0  # a source token with the same text
    averaged: int = 0  # the mean of several source tokens
    special: int = 0  # the source token with the same role
    zero: int = 0  # rows without a source, padding of the vocabulary included


def transfer_rows(
    head: np.ndarray,  # [S, D] float32 output embedding of the source model
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    vocab_size: int,
) -> tuple[np.ndarray, Matches]:  # [vocab_size, D] float32
    """A row for every target token: that of the source token with the same text or the same role, else the mean of the
    rows of the pieces into which the source splits its text, else zeros. One vocabulary for both gives the head itself."""
    rows = np.zeros((vocab_size, head.shape[1]), dtype=np.float32)
    if source.get_vocab() == target.get_vocab():
        same = min(vocab_size, len(head))
        rows[:same] = head[:same]
        return rows, Matches(exact=same, zero=vocab_size - same)

    roles: dict[int, int] = {}
    for role in ROLES:
        token, match = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (target, source))
        if token is not None and match is not None and match < len(head):
            roles.setdefault(token, match)
    for token, match in roles.items():
        rows[token] = head[match]
    source_ids = {key: token for token, key in _texts(source) if token < len(head)}
    texts = _texts(target)
    exact = [(token, source_ids[key]) for token, key in texts if key in source_ids]
    for token, match in exact:
        rows[token] = head[match]
    split = [(token, text) for token, (text, name) in texts if (text, name) not in source_ids]
    averaged = 0
    for (token, _), ids in zip(split, _pieces(source, [text for _, text in split]), strict=True):
        ids = [piece for piece in ids if piece < len(head)]
        if ids:
            rows[token] = head[ids].mean(axis=0)
            averaged += 1
    zero = vocab_size - len(roles) - len(exact) - averaged
    return rows, Matches(len(exact), averaged, len(roles), zero)


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, tuple[str, str]]]:
    """Every ordinary token, and what it stands for in running text; part of a character is told by its name instead."""
    special = _special_ids(tokenizer)
    ids = sorted(token for token in tokenizer.get_vocab().values() if token not in special)
    before = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    prefix, *decoded = tokenizer.decode(
        [before, *([*before, token] for token in ids)], clean_up_tokenization_spaces=False
    )
    texts = [text.removeprefix(prefix) for text in decoded]
    names = tokenizer.convert_ids_to_tokens(ids)
    return [
        (token, (text, name if "\ufffd" in text else ""))
        for token, text, name in zip(ids, texts, names, strict=True)
    ]


def _pieces(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text in running text; none for parts of characters, and no special ones such as unknown."""
    special = _special_ids(tokenizer)
    before, *encoded = tokenizer(
        [BREAK, *(BREAK + text for text in texts)], add_special_tokens=False
    )["input_ids"]
    alone = tokenizer(["", *texts], add_special_tokens=False)["input_ids"][1:]
    pieces = []
    for text, ids, other in zip(texts, encoded, alone, strict=True):
        ids = (
            ids[len(before) :] if ids[: len(before)] == before else other
        )  # it did grow over the break
        pieces.append(
            [token for token in ids if token not in special] if "\ufffd" not in text else []
        )
    return pieces


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, content in added if content.special)}
