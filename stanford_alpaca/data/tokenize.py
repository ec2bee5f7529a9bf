"""From records to examples: token ids, and labels that train the responses only.

A text is encoded as a whole, and the labels follow from character offsets: a token is trained if it starts within a trained
span. So a token that straddles the beginning of a span (it holds the end of the prompt and the start of the response) is not
trained, and counted. Wherever no token straddles, ids and labels of Alpaca records are those of the original Alpaca recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.data.chat import ChatTemplate
from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.formats import form_of
from stanford_alpaca.data.prompts import Rendered, TurnsTemplate, alpaca_turns, plain_turns
from stanford_alpaca.errors import UserError

IGNORE_INDEX = -100
VERSION = "3"  # raise it when the same record would give other examples, so that old caches are not used
PARALLEL_FROM = 10_000  # records; below, starting processes costs more than it saves
TEMPLATES = ("auto", "alpaca", "chat", "plain")
KEPT, EMPTY, FILLED, REFUSED = range(4)  # what becomes of a record
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),  # tokens
        "full_length": Value("int32"),  # before it was cut
        "supervised": Value("int32"),  # targets
        "full_supervised": Value("int32"),
        "straddling": Value("bool"),
        "fate": Value("int8"),
        "refusal": Value("string"),
    }
)

Template = TurnsTemplate | ChatTemplate


@dataclass(frozen=True)
class DataReport:
    """What became of the records of one source."""

    records: int
    kept: int
    no_response: int  # dropped
    filled: int  # dropped: the prompt takes the whole length
    refused: int  # dropped: the template cannot write it
    truncated: int  # kept, but cut at the length (the end is lost)
    straddling: int  # a token holds both prompt and response: not trained
    tokens: int
    supervised_tokens: int
    refusal: str = ""  # the first reason

    @classmethod
    def of(cls, encoded: Dataset) -> "DataReport":
        """The report of what ``encode_records`` returned."""
        columns = {
            name: encoded.data[name].to_numpy() for name in ("fate", "length", "full_length", "supervised", "straddling")
        }
        fate, kept = columns["fate"], columns["fate"] == KEPT
        refused = np.flatnonzero(fate == REFUSED)
        return cls(
            records=len(encoded),
            kept=int(kept.sum()),
            no_response=int((fate == EMPTY).sum()),
            filled=int((fate == FILLED).sum()),
            refused=len(refused),
            truncated=int((columns["length"] < columns["full_length"])[kept].sum()),
            straddling=int(columns["straddling"][kept].sum()),
            tokens=int(columns["length"][kept].sum()),
            supervised_tokens=int(columns["supervised"][kept].sum()),
            refusal=f"record {refused[0] + 1}: {encoded[int(refused[0])]['refusal']}" if len(refused) else "",
        )

    @property
    def dropped(self) -> int:
        return self.no_response + self.filled + self.refused

    def __str__(self) -> str:
        first = f" ({self.refusal})" if self.refusal else ""
        return (
            f"{self.kept:,} of {self.records:,} examples, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised; "
            f"dropped: {self.no_response:,} without a response, {self.filled:,} whose prompt fills the length, "
            f"{self.refused:,} refused by the template{first}; truncated: {self.truncated:,}, straddling: {self.straddling:,}"
        )


@dataclass(frozen=True)
class ExampleEncoder:
    """Turns records of one form into examples."""

    template: Template
    encoder: TextEncoder
    max_length: int

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, form: str, max_length: int, prompt_template: str = "auto"
    ) -> "ExampleEncoder":
        """The encoder for records of a form (see ``formats``), by a template of ``TEMPLATES``.

        Raises:
            UserError: a template that the tokenizer does not have, or that cannot write the form.
        """
        encoder = TextEncoder.of(tokenizer)
        return cls(make_template(prompt_template, form, tokenizer, encoder), encoder, max_length)

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Encodes a batch of records given as columns; the columns of the result are ``FEATURES``."""
        records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rendered, refusals = [], []
        for record in records:
            try:
                rendered.append(self.template.render(record))
                refusals.append("")
            except UserError as error:
                rendered.append(Rendered("", []))
                refusals.append(str(error))
        encoded = self.encoder([text for text, _ in rendered], self.template.add_special_tokens)
        rows = [self.label(ids, offsets, spans) for (ids, offsets), (_, spans) in zip(encoded, rendered, strict=True)]
        for row, refusal in zip(rows, refusals, strict=True):
            row["refusal"] = refusal
            if refusal:
                row["fate"] = REFUSED
        return {name: [row[name] for row in rows] for name in FEATURES}

    def label(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> dict[str, Any]:
        """``label_spans`` at this length."""
        return label_spans(ids, offsets, spans, self.max_length)

    def identity(self) -> str:
        """All that decides the examples."""
        chat = (self.template.template, sorted(self.template.names.items())) if isinstance(self.template, ChatTemplate) else ""
        turns = getattr(self.template, "turns", None)
        return "\n".join(map(str, [VERSION, chat, turns and turns.__name__, self.max_length, self.encoder.identity()]))


class PromptEncoder:
    """Token ids of what generation continues, as training saw it; the records may be of several forms."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_template: str = "auto"):
        self.tokenizer, self.name = tokenizer, prompt_template
        self.encoder = TextEncoder.of(tokenizer)

    def __call__(self, records: list[dict]) -> list[list[int]]:
        """Raises UserError for a record that its template cannot write."""
        prompts = []
        for record in records:
            template = make_template(self.name, form_of(record), self.tokenizer, self.encoder)
            ((ids, _),) = self.encoder([template.prompt(record)], template.add_special_tokens)
            prompts.append(ids)
        return prompts


def check_template(name: str) -> None:
    """Raises UserError for a template that there is not."""
    if name not in TEMPLATES:
        raise UserError(f"--prompt_template {name}: choose from {', '.join(TEMPLATES)}")


def make_template(name: str, form: str, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder) -> Template:
    """The template for records of a form: ``auto`` is Alpaca's for ``alpaca``, the tokenizer's chat template (Alpaca's, if it
    has none) for ``chat``, and no template for ``completion`` and ``text``."""
    if name == "auto":
        has_chat = tokenizer.chat_template is not None
        name = {"alpaca": "alpaca", "chat": "chat" if has_chat else "alpaca"}.get(form, "plain")
    if (form == "text") != (name == "plain") and form != "completion":
        raise UserError(f"--prompt_template {name} cannot write records of the form {form}")
    if name == "chat":
        if tokenizer.chat_template is None:
            raise UserError("--prompt_template chat: the tokenizer has no chat template; use alpaca")
        return ChatTemplate(tokenizer, encoder)
    return TurnsTemplate(alpaca_turns if name == "alpaca" else plain_turns, encoder)


def encode_records(records: Dataset, encode: ExampleEncoder, num_proc: int = 1) -> Dataset:
    """Every record as a row of ``FEATURES``, the dropped ones too; in parallel, and cached."""
    key = f"{records._fingerprint}\n{encode.identity()}"
    return records.map(
        encode,
        batched=True,
        features=FEATURES,
        remove_columns=records.column_names,
        num_proc=num_proc if len(records) >= PARALLEL_FROM else None,
        new_fingerprint=sha256(key.encode()).hexdigest()[:32],
        desc="Tokenizing",
    )


def tokenize_records(
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    num_proc: int = 1,
    prompt_template: str = "auto",
) -> tuple[Dataset, DataReport]:
    """Tokenizes and masks every record, and drops those without a target.

    Returns:
        Examples with ``input_ids`` and ``labels`` (lists of int of one length, at most max_length), and the report.

    Raises:
        UserError: no example is left.
    """
    encode = ExampleEncoder.of(tokenizer, form_of(records.column_names), max_length, prompt_template)
    encoded = encode_records(records, encode, num_proc)
    report = DataReport.of(encoded)
    if report.kept == 0:
        raise UserError(f"no example has a token to train on: {report}; raise --model_max_length or mend the data")
    if report.dropped:
        encoded = encoded.select(np.flatnonzero(encoded.data["fate"].to_numpy() == KEPT))
    return encoded.select_columns(["input_ids", "labels"]), report


def stream_records(records: IterableDataset, encode: ExampleEncoder) -> IterableDataset:
    """The examples of a stream of records, tokenized as they are reached; those without a target are passed over."""
    encoded = records.map(encode, batched=True, batch_size=256, remove_columns=records.column_names, features=FEATURES)
    return encoded.filter(lambda fate: fate == KEPT, input_columns="fate").select_columns(["input_ids", "labels"])


def label_spans(
    ids: list[int],
    offsets: list[tuple[int, int]],  # characters [start, end) of every token; (0, 0) for those the tokenizer added
    spans: list[tuple[int, int]],  # characters that are trained, in order
    max_length: int,
) -> dict[str, Any]:
    """Labels the tokens that start within a span, then cuts at max_length tokens."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begins = np.array([begin for begin, _ in spans], dtype=np.int64)
    stops = np.array([stop for _, stop in spans], dtype=np.int64)
    index = np.searchsorted(begins, starts, side="right") - 1  # of the last span that begins at or before the token
    trained = np.zeros(len(ids), dtype=bool)
    straddling = False
    if spans:
        trained = (index >= 0) & (starts < stops[index])
        following = begins[np.minimum(index + 1, len(spans) - 1)]
        straddling = bool(((starts < following) & (following < ends)).any())
    if ids and offsets[0] == (0, 0):
        trained[0] = False  # what the tokenizer put first
    labels = np.where(trained, np.array(ids, dtype=np.int64), IGNORE_INDEX)
    full_supervised = int(trained[1:].sum())  # the first position is never predicted, so it is no target
    supervised = int(trained[1:max_length].sum())
    return {
        "input_ids": ids[:max_length],
        "labels": labels[:max_length].tolist(),
        "length": min(len(ids), max_length),
        "full_length": len(ids),
        "supervised": supervised,
        "full_supervised": full_supervised,
        "straddling": straddling,
        "fate": KEPT if supervised else FILLED if full_supervised else EMPTY,
    }
