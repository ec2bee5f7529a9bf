"""Running text as blocks of one length: documents one after the other, an end-of-sequence token after each.

A block begins with the last token of the one before, as context: so every token of the text is a target exactly once, whatever
the length of the blocks. The last block of a source is as long as what is left.
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

PIECE = (
    2**20
)  # characters that are tokenized at a time; longer documents are tokenized in parts, which end with a line
CUT = re.compile(r"\n(?=\S)")
IDS = Features({"input_ids": List(Value("int32")), "notes": List(Value("string"))})
BLOCK = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
BLOCKS_VERSION = "3"  # raise it when the same text would give other ids


@dataclass(frozen=True)
class BlockReport:
    """What became of the documents of one source."""

    documents: int
    blocks: int
    block_size: int
    targets: int
    max_sentences: int | None  # that were taken
    unused: Mapping[str, int] = field(default_factory=dict)  # fields that are not read -> documents
    notes: Mapping[str, int] = field(default_factory=dict)  # see ``Rendered`` -> documents
    template: str = ""  # there are no prompts

    def lines(self) -> list[str]:
        """The report as a run prints it."""
        return [str(self), *count_lines(self.documents, self.unused, self.notes)]

    def __str__(self) -> str:
        first = f"the first {self.max_sentences:,} lines: " if self.max_sentences else ""
        return (
            f"{first}{self.documents:,} document(s), {self.blocks:,} block(s) of at most {self.block_size} tokens; "
            f"{self.targets:,} tokens, each a target once"
        )


@dataclass(frozen=True)
class DocumentEncoder:
    """Turns documents into token ids: what the tokenizer puts first, the text, the end-of-sequence token.

    A tokenizer that puts the end-of-sequence token first (OPT's) puts nothing here: one stands there already.
    """

    encoder: TextEncoder
    before: int | None = None  # what the tokenizer puts first

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, special_tokens: str = "text"
    ) -> "DocumentEncoder":
        """The encoder of a tokenizer, with one of ``READINGS``."""
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
        """Of a part of the written text. One that is not the first is encoded behind its line break: some tokenizers put a
        space, or something else, at the beginning of what they are given."""
        if start == 0:
            return self.encoder(
                [text[:end]], self.before is not None and not self.encoder.begins(text)
            )[0][0]
        ((ids, spans),) = self.encoder([text[start - 1 : end]], add_special_tokens=False)
        first = next((i for i, (begin, _) in enumerate(spans) if begin >= 1), len(ids))
        if first < len(ids) and spans[first][0] == 1:
            return ids[first:]
        return self.encoder([text[start:end]], add_special_tokens=False)[0][
            0
        ]  # the line break is in one token with a letter


def _int32(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _parts(text: str) -> Iterator[tuple[int, int]]:
    """Where parts of about PIECE characters begin and end: behind a line break that no white space follows."""
    start = 0
    while start == 0 or start < len(text):
        cut = CUT.search(text, start + PIECE)
        end = cut.end() if cut else len(text)
        yield start, end
        start = end or 1


def make_blocks(
    records: Dataset,  # of the form text, a document each
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_proc: int = 1,
    cache_dir: str | None = None,
    max_sentences: int | None = None,  # for the report
    special_tokens: str = "text",  # of READINGS
) -> tuple[Dataset, BlockReport]:
    """Blocks with ``input_ids`` and ``labels``, and the report.

    Not a target are the first token of each block, which is the last target of the block before it (of the first block: an
    end-of-sequence token, or what the tokenizer puts before a text), and what the tokenizer puts before a text.

    Raises:
        UserError: records of another form.
    """
    form = form_of(records.column_names)
    if form != "text":
        raise UserError(
            f"--block_size cuts running text, and these are records of the form {form}: fine-tune on them with train_emo.sh"
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
    """The generator behind the cached table. ``before``: the token that the tokenizer puts before a text, if there is one."""
    held = _int32(
        [] if before is not None else [eos_id]
    )  # the last token of the block before, and what follows it
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
