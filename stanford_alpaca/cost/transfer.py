"""Takes another model's output embedding as the cost embedding, also across tokenizers."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

# a token with several roles is matched by the first that the source has too
SPECIAL_ROLES = ("eos", "bos", "unk", "pad")
BEFORE = "a"  # each token is decoded after this text, so that its leading space shows
# each text is encoded after this one: pieces do not extend over it, and no space is put after it
BREAK = "\n"


@dataclass(frozen=True)
class Matches:
    """How many rows come from where."""

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
    """Returns a row for every target token, and where the rows come from.

    A row is that of the source token with the same text or the same role. If there is none, it is
    the mean of the rows of the pieces into which the source splits the token's text, else zeros. If
    both tokenizers have the same vocabulary, the rows are the head itself.
    """
    rows = np.zeros((vocab_size, head.shape[1]), dtype=np.float32)
    if source.get_vocab() == target.get_vocab():
        same = min(vocab_size, len(head))
        rows[:same] = head[:same]
        return rows, Matches(exact=same, zero=vocab_size - same)

    roles: dict[int, int] = {}
    for role in SPECIAL_ROLES:
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
    """Returns every ordinary token and what it stands for in running text.

    A token that is part of a character is identified by its name instead.
    """
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
    """Returns the ids of each text in running text, without special ones such as unknown.

    Parts of characters have none.
    """
    special = _special_ids(tokenizer)
    before, *encoded = tokenizer(
        [BREAK, *(BREAK + text for text in texts)], add_special_tokens=False
    )["input_ids"]
    alone = tokenizer(["", *texts], add_special_tokens=False)["input_ids"][1:]
    pieces = []
    for text, ids, other in zip(texts, encoded, alone, strict=True):
        # if a piece did extend over the break, the ids of the text alone
        ids = ids[len(before) :] if ids[: len(before)] == before else other
        pieces.append(
            [token for token in ids if token not in special] if "\ufffd" not in text else []
        )
    return pieces


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, content in added if content.special)}
