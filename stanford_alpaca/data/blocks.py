"""Cuts running text into blocks of one length.

The documents are concatenated, with an end-of-sequence token after each. A block begins with the
last token of the block before, as context. So every token of the text is a target exactly once,
whatever the block size. The last block of a source holds the tokens that are left.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.data.cache import mapped, table
from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.prompts import text_note
from stanford_alpaca.data.records import form_of, unused_fields
from stanford_alpaca.data.report import count_lines, note_counts
from stanford_alpaca.data.tokenize import IGNORE_INDEX, PARALLEL_FROM
from stanford_alpaca.errors import UserError

# characters to tokenize at a time; a longer document is tokenized in parts that end with a line
PIECE = 2**20
CUT = re.compile(r"\n(?=\S)")
IDS = Features({"input_ids": List(Value("int32")), "notes": List(Value("string"))})
BLOCK = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
BLOCKS_VERSION = "3"  # raise it when the same text gives other ids


@dataclass(frozen=True)
class BlockReport:
    """What happened to the documents of one source."""

    documents: int
    blocks: int
    block_size: int
    targets: int
    max_sentences: int | None  # only the first so many lines or rows were read; None: all
    unused: Mapping[str, int] = field(default_factory=dict)  # unread field -> documents with it
    notes: Mapping[str, int] = field(default_factory=dict)  # note -> documents, see ``Rendered``
    template: str = ""  # empty, because there are no prompts

    def lines(self) -> list[str]:
        """Returns the report as a run prints it."""
        return [str(self), *count_lines(self.documents, self.unused, self.notes)]

    def __str__(self) -> str:
        first = f"the first {self.max_sentences:,} lines: " if self.max_sentences else ""
        return (
            f"{first}{self.documents:,} document(s), {self.blocks:,} block(s) of at most "
            f"{self.block_size} tokens; {self.targets:,} tokens, each a target once"
        )


@dataclass(frozen=True)
class DocumentEncoder:
    """Turns a document into token ids: the tokenizer's first token, the text, an end of sequence.

    Some tokenizers put the end-of-sequence token first (OPT's). It is not added then, because the
    document before already ends with one.
    """

    encoder: TextEncoder
    before: int | None = None  # the token that the tokenizer puts first, if it is added

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, special_tokens: str = "text"
    ) -> "DocumentEncoder":
        """Returns the encoder of a tokenizer; ``special_tokens`` is one of ``READINGS``."""
        encoder = TextEncoder.of(tokenizer, special_tokens)
        ((first, _),) = encoder([""], True)
        return cls(encoder, first[0] if first and first[0] != encoder.eos_id else None)

    def __call__(self, batch: Mapping[str, list[str]]) -> dict[str, list]:
        return {
            "input_ids": [self.ids(text) for text in batch["text"]],
            "notes": [text_note(self.encoder.field(text)[1]) for text in batch["text"]],
        }

    def ids(self, text: str) -> np.ndarray:  # [tokens] int32
        text, _ = self.encoder.field(text)
        parts = [self._ids(text, start, end) for start, end in _parts(text)]
        closed = text.rstrip().endswith(self.encoder.special(self.encoder.eos_token))
        return np.concatenate(
            [*map(_int32, parts), _int32([] if closed else [self.encoder.eos_id])]
        )

    def _ids(self, text: str, start: int, end: int) -> list[int]:
        """Encodes one part of the written text.

        A later part is encoded together with the line break before it, because some tokenizers put
        a space, or something else, at the beginning of what they encode.
        """
        if start == 0:
            return self.encoder(
                [text[:end]], self.before is not None and not self.encoder.begins(text)
            )[0][0]
        ((ids, spans),) = self.encoder([text[start - 1 : end]], add_special_tokens=False)
        first = next((i for i, (begin, _) in enumerate(spans) if begin >= 1), len(ids))
        if first < len(ids) and spans[first][0] == 1:
            return ids[first:]
        # the line break shares a token with what follows it
        return self.encoder([text[start:end]], add_special_tokens=False)[0][0]


def _int32(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _parts(text: str) -> Iterator[tuple[int, int]]:
    """Yields where parts of about PIECE characters begin and end.

    A part ends after a line break that no white space follows.
    """
    start = 0
    while start == 0 or start < len(text):
        cut = CUT.search(text, start + PIECE)
        end = cut.end() if cut else len(text)
        yield start, end
        start = end or 1


def make_blocks(
    records: Dataset,  # of the form ``text``, one document each
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_proc: int = 1,
    cache_dir: str | None = None,
    max_sentences: int | None = None,  # for the report only
    special_tokens: str = "text",  # one of READINGS
) -> tuple[Dataset, BlockReport]:
    """Returns blocks with ``input_ids`` and ``labels``, and their report.

    The first token of each block is no target. It is the last target of the block before; in the
    first block it is an end-of-sequence token, or the one that the tokenizer puts before a text.
    Tokens that the tokenizer puts before a text are no targets either.

    Raises:
        UserError: the records have another form.
    """
    form = form_of(records.column_names)
    if form != "text":
        raise UserError(
            f"--block_size cuts running text, and these are records of the form {form}: "
            "fine-tune on them with train_emo.sh"
        )
    encode = DocumentEncoder.of(tokenizer, special_tokens)
    parallel = num_proc if len(records) >= PARALLEL_FROM else None
    key = f"{BLOCKS_VERSION}\n{encode.encoder.identity()}"
    documents = mapped(records, encode, key, batch_size=100, features=IDS, num_proc=parallel)
    source = {
        "documents": documents,
        "block_size": block_size,
        "before": encode.before,
        "eos_id": encode.encoder.eos_id,
    }
    blocks = table(_blocks, source, BLOCK, cache_dir)
    labels = (
        np.asarray(batch["labels"].combine_chunks().flatten())
        for batch in blocks.with_format("arrow").iter(10_000)
    )
    targets = sum(int((values != IGNORE_INDEX).sum()) for values in labels)
    unused = unused_fields(records, also="weight")
    return blocks, BlockReport(
        len(records),
        len(blocks),
        block_size,
        targets,
        max_sentences,
        unused,
        note_counts(documents),
    )


def _blocks(
    documents: Dataset, block_size: int, before: int | None, eos_id: int
) -> Iterator[dict[str, Any]]:
    """Yields the blocks of the cached table.

    Args:
        before: the token that the tokenizer puts before a text, or None.
    """
    # the last token of the block before, and the tokens that follow it
    held = _int32([] if before is not None else [eos_id])
    for batch in documents.with_format("numpy").iter(batch_size=100):
        held = np.concatenate([held, *batch["input_ids"]])
        step = block_size - 1
        whole = max(0, (len(held) - 1) // step)
        for start in range(0, whole * step, step):
            yield _block(held[start : start + block_size], before)
        held = held[whole * step :]
    if len(held) > 1:
        yield _block(held, before)


def _block(ids: np.ndarray, before: int | None) -> dict[str, Any]:
    labels = ids.copy()
    labels[0] = IGNORE_INDEX
    if before is not None:
        labels[ids == before] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}
