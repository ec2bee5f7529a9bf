"""Turns records into examples: token ids, and labels that train the responses only.

A text is encoded as a whole, and the labels follow from character offsets: a token is trained if
it starts and ends within one trained span. A token that straddles either end of a span (it holds
the end of the prompt and the start of the response) is counted and not trained. If no token
straddles, the ids and labels of Alpaca records are those of the original Alpaca recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.data.cache import mapped
from stanford_alpaca.data.chat import ChatTemplate
from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.prompts import Rendered, alpaca_turns
from stanford_alpaca.data.records import form_of, unused_fields
from stanford_alpaca.data.report import EMPTY, FILLED, KEPT, REFUSED, DataReport
from stanford_alpaca.data.templates import Template, asked_otherwise, follow, make_template
from stanford_alpaca.errors import UserError

IGNORE_INDEX = -100
# raise it when the same record gives other examples, so that old caches are not used
EXAMPLES_VERSION = "4"
PARALLEL_FROM = 10_000  # records; for fewer, starting processes costs more than it saves
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "weights": List(Value("float32")),  # by which each token's loss is multiplied; empty: 1
        "length": Value("int32"),  # tokens
        "full_length": Value("int32"),  # tokens before it was cut
        "supervised": Value("int32"),  # targets
        "full_supervised": Value("int32"),  # targets before it was cut
        "straddling": Value("bool"),  # whether a token straddles an end of a trained span
        "fate": Value("int8"),  # see ``report``
        "refusal": Value("string"),  # why the template cannot write the record, or ""
        "notes": List(Value("string")),  # see ``Rendered``
    }
)
EXAMPLE = ["input_ids", "labels", "weights"]  # the columns that training reads
WEIGHTED = "tokens whose loss is multiplied by a weight other than 1"
NO_TARGET = "no example has a token to train on: {}; raise --model_max_length or mend the data"


@dataclass(frozen=True)
class ExampleEncoder:
    """Turns records of one form into examples."""

    template: Template
    encoder: TextEncoder
    max_length: int

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        form: str,
        max_length: int,
        prompt_template: str = "auto",
        special_tokens: str = "text",
    ) -> "ExampleEncoder":
        """Returns the encoder for records of a form.

        Args:
            form: see ``records``.
            prompt_template: one of ``TEMPLATES``.
            special_tokens: one of ``READINGS``.

        Raises:
            UserError: the tokenizer does not have the template, or it cannot write the form.
        """
        encoder = TextEncoder.of(tokenizer, special_tokens)
        return cls(make_template(prompt_template, form, tokenizer, encoder), encoder, max_length)

    @classmethod
    def as_trained(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        form: str,
        max_length: int,
        prompt_template: str = "auto",
        special_tokens: str | None = None,
    ) -> "ExampleEncoder":
        """Returns the encoder for what a model was trained with, see ``templates.follow``.

        The arguments may ask for something else.
        """
        return cls.of(
            tokenizer, form, max_length, *follow(tokenizer, form, prompt_template, special_tokens)
        )

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Encodes a batch of records, given as columns. The result has the columns ``FEATURES``."""
        records = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        rendered, refusals = [], []
        for record in records:
            try:
                rendered.append(self.template.render(record))
                refusals.append("")
            except UserError as error:
                rendered.append(Rendered("", [], []))
                refusals.append(str(error))
        encoded = self.encoder(
            [of.text for of in rendered],
            [self.template.adds_special_tokens(of.text) for of in rendered],
        )
        rows = [
            self.label(ids, offsets, of.spans, of.weights)
            for (ids, offsets), of in zip(encoded, rendered, strict=True)
        ]
        for row, refusal, of in zip(rows, refusals, rendered, strict=True):
            row |= {
                "refusal": refusal,
                "notes": [*of.notes, *([WEIGHTED] if row["weights"] else [])],
            }
            if refusal:
                row["fate"] = REFUSED
        return {name: [row[name] for row in rows] for name in FEATURES}

    def in_parts(
        self, record: Mapping
    ) -> tuple[str, list[int], list[tuple[int, int]], dict[str, Any]]:
        """Returns a record's text, token ids, their character spans, and its row of ``FEATURES``.

        The ids in the row may be cut at the maximum length; the others are complete.

        Raises:
            UserError: the template cannot write the record.
        """
        of = self.template.render(record)
        ((ids, offsets),) = self.encoder([of.text], self.template.adds_special_tokens(of.text))
        return of.text, ids, offsets, self.label(ids, offsets, of.spans, of.weights)

    def label(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        spans: list[tuple[int, int]],
        weights: list[float] | None = None,
    ) -> dict[str, Any]:
        """Calls ``label_spans`` with the maximum length of this encoder."""
        return label_spans(ids, offsets, spans, self.max_length, weights)

    @property
    def template_name(self) -> str:
        """The name of the template: one of ``TEMPLATES``, and never ``auto``."""
        if isinstance(self.template, ChatTemplate):
            return "chat"
        return "alpaca" if self.template.turns is alpaca_turns else "plain"

    def identity(self) -> str:
        """Returns everything that decides the examples, for the keys of caches."""
        chat: Any = ""
        if isinstance(self.template, ChatTemplate):
            of_tools = self.template.for_tools
            chat = (
                self.template.template,
                of_tools and of_tools.template,
                sorted(self.template.names.items()),
            )
        return "\n".join(
            map(
                str,
                [
                    EXAMPLES_VERSION,
                    chat,
                    self.template_name,
                    self.max_length,
                    self.encoder.identity(),
                ],
            )
        )


class PromptEncoder:
    """Encodes the prompts that generation continues. The records may have several forms.

    Args:
        prompt_template: ``auto`` is what the model was trained with, see ``templates.follow``.
        special_tokens: None is what the model was trained with.

    Attributes:
        templates, names: form -> the template and its name in ``TEMPLATES``.
        otherwise: form -> in words, how the prompts differ from those of training, see
            ``templates.asked_otherwise``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_template: str = "auto",
        special_tokens: str | None = None,
    ):
        self.tokenizer, self.asked = tokenizer, (prompt_template, special_tokens)
        self.templates: dict[str, Template] = {}
        self.names: dict[str, str] = {}
        self.otherwise: dict[str, str] = {}

    def __call__(self, records: list[dict]) -> list[list[int]]:
        """Returns the token ids of the records' prompts.

        Raises:
            UserError: the template cannot write a record.
        """
        prompts = []
        for record in records:
            form = form_of(record)
            if form not in self.templates:
                asked = follow(self.tokenizer, form, *self.asked)
                encoder = TextEncoder.of(self.tokenizer, asked.special_tokens)
                self.names[form] = asked.template
                self.otherwise[form] = asked_otherwise(self.tokenizer, form, asked)
                self.templates[form] = make_template(asked.template, form, self.tokenizer, encoder)
            template = self.templates[form]
            text = template.prompt(record)
            ((ids, _),) = template.encoder([text], template.adds_special_tokens(text))
            prompts.append(ids)
        return prompts


def encode_records(records: Dataset, encode: ExampleEncoder, num_proc: int = 1) -> Dataset:
    """Encodes every record to a row of ``FEATURES``, in parallel if there are many.

    The result is cached. It also has rows for the records that training drops.
    """
    parallel = num_proc if len(records) >= PARALLEL_FROM else None
    return mapped(records, encode, encode.identity(), features=FEATURES, num_proc=parallel)


def tokenize_records(
    records: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    num_proc: int = 1,
    prompt_template: str = "auto",
    special_tokens: str = "text",
) -> tuple[Dataset, DataReport]:
    """Tokenizes and masks every record, and drops those without a target.

    Returns:
        Examples with the columns ``EXAMPLE`` (lists of one length, at most max_length), and the
        report.

    Raises:
        UserError: no example is left.
    """
    form = form_of(records.column_names)
    encode = ExampleEncoder.of(tokenizer, form, max_length, prompt_template, special_tokens)
    encoded = encode_records(records, encode, num_proc)
    report = DataReport.of(
        encoded, unused_fields(records), "" if form == "text" else encode.template_name
    )
    if report.kept == 0:
        raise UserError(NO_TARGET.format(report))
    if report.dropped:
        encoded = encoded.select(np.flatnonzero(encoded.data["fate"].to_numpy() == KEPT))
    return encoded.select_columns(EXAMPLE), report


def stream_records(records: IterableDataset, encode: ExampleEncoder) -> IterableDataset:
    """Tokenizes a stream of records as they are reached. Skips those without a target."""

    def kept(batch: dict[str, list]) -> dict[str, list]:
        rows = encode(batch)
        places = [i for i, fate in enumerate(rows["fate"]) if fate == KEPT]
        return {name: [rows[name][i] for i in places] for name in EXAMPLE}

    return records.map(
        kept,
        batched=True,
        batch_size=256,
        remove_columns=records.column_names,
        features=Features({name: FEATURES[name] for name in EXAMPLE}),
    )


def label_spans(
    ids: list[int],
    offsets: list[tuple[int, int]],
    spans: list[tuple[int, int]],
    max_length: int,
    weights: list[float] | None = None,
) -> dict[str, Any]:
    """Labels the tokens that lie within a span, then cuts at max_length tokens.

    Args:
        offsets: characters [start, end) of every token; (0, 0) for those the tokenizer added.
        spans: characters [start, end) that are trained, in order.
        weights: one per span; a span of weight 0 is not trained.

    Returns:
        A row of ``FEATURES``, without ``refusal`` and ``notes``.
    """
    counted = [
        (*span, weight)
        for span, weight in zip(spans, weights or [1.0] * len(spans), strict=True)
        if weight
    ]
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begins, stops, factors = np.array(counted, dtype=np.float64).reshape(-1, 3).T
    # index of the last span that begins at the token or before it
    index = np.searchsorted(begins, starts, side="right") - 1
    trained = np.zeros(len(ids), dtype=bool)
    straddling = False
    if counted:
        starting = (index >= 0) & (starts < stops[index])
        trained = starting & (ends <= stops[index])
        following = begins[np.minimum(index + 1, len(counted) - 1)]
        straddling = bool(
            (starting & ~trained).any() or ((starts < following) & (following < ends)).any()
        )
    if ids and offsets[0] == (0, 0):
        trained[0] = False  # the tokenizer put it first
    labels = np.where(trained, np.array(ids, dtype=np.int64), IGNORE_INDEX)
    full_supervised = int(trained[1:].sum())  # nothing predicts the first token: it is no target
    supervised = int(trained[1:max_length].sum())
    of_tokens = np.where(trained, factors[index], 1.0) if (factors != 1).any() else np.ones(0)
    return {
        "input_ids": ids[:max_length],
        "labels": labels[:max_length].tolist(),
        "weights": of_tokens[:max_length].tolist(),
        "length": min(len(ids), max_length),
        "full_length": len(ids),
        "supervised": supervised,
        "full_supervised": full_supervised,
        "straddling": straddling,
        "fate": KEPT if supervised else FILLED if full_supervised else EMPTY,
    }
