"""From records to examples: token ids, and labels that train the response only.

Prompt and response are encoded in one go, and the labels follow from character offsets: a token is trained if its span
starts at or after the response. A token that straddles the boundary (it holds the end of the prompt and the start of the
response) is not trained, and counted. Wherever no token straddles, ids and labels are those of the original Alpaca recipe.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.errors import UserError

IGNORE_INDEX = -100
VERSION = "1"  # raise it when the same record would give other examples, so that old caches are not used
PARALLEL_FROM = 10_000  # records; below, starting processes costs more than it saves


@dataclass(frozen=True)
class DataReport:
    """What became of the records of one source."""

    records: int
    kept: int
    dropped: int  # no target left: an empty response, or a prompt that fills the length
    truncated: int  # kept, but cut at the length (the end-of-sequence token is lost)
    straddling: int  # a token holds both prompt and response: not trained
    tokens: int
    supervised_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.kept:,} of {self.records:,} examples, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised; "
            f"dropped without a target: {self.dropped:,}, truncated: {self.truncated:,}, straddling: {self.straddling:,}"
        )


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts in which no special token is ever found; those that the tokenizer adds itself stay, but for the last.

    Args:
        tokenizer: a copy that takes special-token text for text.
        eos_id: the end-of-sequence token.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TextEncoder":
        """The encoder of a tokenizer.

        ``split_special_tokens`` is not enough where the pieces of the model itself hold the special tokens' names, as those
        of a unigram model do: there the pieces get a name that is no text (U+FFFF is no character), under the same id.

        Raises:
            UserError: a tokenizer without character offsets.
        """
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{type(tokenizer).__name__} gives no character offsets: a fast one (tokenizer.json) is needed")
        copy = deepcopy(tokenizer)
        copy.split_special_tokens = True
        found = [
            token
            for token, token_id in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
            if token_id in copy(token, add_special_tokens=False)["input_ids"]
        ]
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if found and state["model"]["type"] == "Unigram":
            vocab = state["model"]["vocab"]
            state["model"]["vocab"] = [[f"\uffff{piece}" if piece in found else piece, score] for piece, score in vocab]
            copy._tokenizer = Tokenizer.from_str(json.dumps(state))
        return cls(copy, tokenizer.eos_token_id)

    def __call__(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character spans [start, end) of every text, without an end-of-sequence token the tokenizer adds."""
        encoded = self.tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
        columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
        return [
            (ids[:-1], spans[:-1]) if ids and special[-1] and ids[-1] == self.eos_id else (ids, spans)
            for ids, spans, special in zip(*columns, strict=True)
        ]

    def identity(self) -> str:
        """All that decides ids and spans."""
        return f"{self.tokenizer.backend_tokenizer.to_str()}\n{self.eos_id}"


def tokenize_records(
    records: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int = 1
) -> tuple[Dataset, DataReport]:
    """Tokenizes and masks every record, in parallel and cached, and drops those without a target.

    Returns:
        Examples with ``input_ids`` and ``labels`` (lists of int of one length, at most max_length), and the report.

    Raises:
        UserError: no example is left.
    """
    encoder = TextEncoder.of(tokenizer)
    key = "\n".join([VERSION, records._fingerprint, str(max_length), encoder.identity()])
    encoded = records.map(
        encode_batch,
        batched=True,
        fn_kwargs={"encoder": encoder, "max_length": max_length},
        remove_columns=records.column_names,
        num_proc=num_proc if len(records) >= PARALLEL_FROM else None,
        new_fingerprint=sha256(key.encode()).hexdigest()[:32],
        desc="Tokenizing",
    )
    counts = {name: encoded.data[name].to_numpy() for name in ("supervised", "truncated", "straddling", "length")}
    kept = counts["supervised"] > 0
    report = DataReport(
        records=len(encoded),
        kept=int(kept.sum()),
        dropped=int((~kept).sum()),
        truncated=int(counts["truncated"][kept].sum()),
        straddling=int(counts["straddling"][kept].sum()),
        tokens=int(counts["length"][kept].sum()),
        supervised_tokens=int(counts["supervised"].sum()),
    )
    if report.kept == 0:
        raise UserError(f"no example has a token to train on: {report}; raise --model_max_length or mend the data")
    examples = encoded if report.dropped == 0 else encoded.select(kept.nonzero()[0])
    return examples.select_columns(["input_ids", "labels"]), report


def encode_batch(batch: dict[str, list[str]], encoder: TextEncoder, max_length: int) -> dict[str, list[Any]]:
    """Encodes lists of instruction, input and output; the columns of the result are those of ``label_response``."""
    prompts = [
        format_prompt({"instruction": instruction, "input": text})
        for instruction, text in zip(batch["instruction"], batch["input"], strict=True)
    ]
    encoded = encoder([prompt + output for prompt, output in zip(prompts, batch["output"], strict=True)])
    rows = [
        label_response(ids, spans, len(prompt), encoder.eos_id, max_length)
        for (ids, spans), prompt in zip(encoded, prompts, strict=True)
    ]
    for row, output in zip(rows, batch["output"], strict=True):
        if not output:  # nothing was asked for: the end-of-sequence token alone teaches nothing
            row.update(labels=[IGNORE_INDEX] * row["length"], supervised=0)
    return {name: [row[name] for row in rows] for name in rows[0]}


def label_response(
    ids: list[int],
    spans: list[tuple[int, int]],  # characters [start, end) of every token; (0, 0) for added special tokens
    boundary: int,  # characters of the prompt
    eos_id: int,
    max_length: int,
) -> dict[str, Any]:
    """Labels what belongs to the response, appends the end-of-sequence token, then cuts at max_length tokens."""
    labels = [token if start >= boundary else IGNORE_INDEX for token, (start, _) in zip(ids, spans, strict=True)]
    straddling = any(start < boundary < end for start, end in spans)
    ids, labels = [*ids, eos_id], [*labels, eos_id]
    truncated = len(ids) > max_length
    ids, labels = ids[:max_length], labels[:max_length]
    # the first position is never predicted, so it is no target
    supervised = sum(label != IGNORE_INDEX for label in labels[1:])
    return {
        "input_ids": ids,
        "labels": labels,
        "supervised": supervised,
        "truncated": truncated,
        "straddling": straddling,
        "length": len(ids),
    }
