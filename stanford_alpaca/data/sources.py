"""Combines several sources into one set of examples, in memory or streamed.

The sources are concatenated, or examples are drawn from them with weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.data.blocks import BlockReport, make_blocks
from stanford_alpaca.data.formats import check_columns, load_records, local_files, several_files
from stanford_alpaca.data.reading import digest_of
from stanford_alpaca.data.records import form_of, unused_fields
from stanford_alpaca.data.report import DataReport
from stanford_alpaca.data.tokenize import (
    EXAMPLE,
    FEATURES,
    NO_TARGET,
    ExampleEncoder,
    stream_records,
    tokenize_records,
)
from stanford_alpaca.errors import UserError

LOOKED_AT = 256  # records of a stream that are examined before training


@dataclass(frozen=True)
class Loading:
    """How sources become examples.

    Args:
        max_length: the maximum number of tokens of an example.
        block_size: the tokens of a block of running text, see ``blocks``; None for examples.
        documents, max_sentences, detokenize: only with a block_size, see ``documents.Texts``.
        prompt_template: one of ``templates.TEMPLATES``.
        special_tokens: one of ``encode.READINGS``.
        train_history: see ``records.parse_record``.
        columns: our column names -> the names in the files.
        shuffle_buffer: how many examples of a stream are held to be shuffled.
    """

    max_length: int
    prompt_template: str = "auto"
    special_tokens: str = "text"
    train_history: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    cache_dir: str | None = None
    num_proc: int = 1
    seed: int = 42
    shuffle_buffer: int = 10_000
    block_size: int | None = None
    documents: str = "auto"
    max_sentences: int | None = None
    detokenize: bool = False

    def records(self, path: str) -> Dataset:
        """Returns the records of a source, checked. Raises UserError for the first bad one."""
        documents = None if self.block_size is None else self.documents
        return load_records(
            path,
            self.cache_dir,
            columns=self.columns,
            documents=documents,
            max_sentences=self.max_sentences,
            detokenize=self.detokenize,
            train_history=self.train_history,
        )

    def encoder(self, tokenizer: PreTrainedTokenizerBase, form: str) -> ExampleEncoder:
        """Returns the encoder for records of a form. Raises like ``ExampleEncoder.of``."""
        return ExampleEncoder.of(
            tokenizer, form, self.max_length, self.prompt_template, self.special_tokens
        )


def check_sources(paths: list[str], loading: Loading) -> None:
    """Reads and checks every record of every source, and leaves them in the cache.

    Raises:
        UserError: the first bad record.
    """
    check_columns(paths, loading.columns)
    for path in paths:
        loading.records(path)


def load_source(
    path: str, tokenizer: PreTrainedTokenizerBase, loading: Loading
) -> tuple[Dataset, DataReport | BlockReport]:
    """Returns the examples or blocks of one source, and the report on its records.

    Raises:
        UserError: the source cannot be used; the message names it.
    """
    records = loading.records(path)
    try:
        if loading.block_size is not None:
            return make_blocks(
                records,
                tokenizer,
                loading.block_size,
                loading.num_proc,
                loading.cache_dir,
                loading.max_sentences,
                loading.special_tokens,
            )
        return tokenize_records(
            records,
            tokenizer,
            loading.max_length,
            loading.num_proc,
            loading.prompt_template,
            loading.special_tokens,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def stream_sources(
    paths: list[str],
    weights: list[float] | None,
    tokenizer: PreTrainedTokenizerBase,
    loading: Loading,
    tell: Callable[[str], None] = lambda line: None,
) -> "ExampleStream":
    """Returns the examples of sources as a stream without end, shuffled within a buffer.

    The sources need not fit into memory.

    Args:
        tell: gets lines about the first records of each source.

    Raises:
        UserError: there are several sources without weights, or one has nothing to train.
    """
    if len(paths) > 1 and weights is None:
        raise UserError(
            "--streaming from several sources needs --data_weights: "
            "the streams have no lengths to go by"
        )
    streams = []
    templates: dict[str, None] = {}
    for path in paths:
        records = load_records(
            path,
            loading.cache_dir,
            columns=loading.columns,
            streaming=True,
            train_history=loading.train_history,
        )
        encode = loading.encoder(tokenizer, form_of(list(records.features)))
        for line in several_files(path):
            tell(line)
        _look_at(path, records, encode, tell)
        if "text" not in records.features:
            templates[encode.template_name] = None
        streams.append(stream_records(records, encode).repeat(None))
    stream = mix(streams, weights, loading.seed)
    return ExampleStream(
        stream.shuffle(seed=loading.seed, buffer_size=loading.shuffle_buffer), list(templates)
    )


def _look_at(
    path: str, records: IterableDataset, encode: ExampleEncoder, tell: Callable[[str], None]
) -> None:
    """Reports what happens to a stream's first records.

    Raises:
        UserError: no record of the stream has a target.
    """
    first = Dataset.from_list(list(records.take(LOOKED_AT)), features=records.features)
    seen = Dataset.from_dict(encode(first.to_dict()), features=FEATURES)
    report = DataReport.of(seen, unused_fields(first))
    for line in report.lines():
        tell(f"{path}, its first {len(first):,} records: {line}")
    if report.kept == 0 and next(iter(stream_records(records, encode)), None) is None:
        raise UserError(f"{path}: {NO_TARGET.format(report)}")


def mix(sources: list, weights: list[float] | None, seed: int) -> Dataset:
    """Combines sources into one set of examples. Without weights, each example is in it once.

    With weights, each example is drawn from source i with the probability
    weights[i] / sum(weights), until every source has been seen completely. Until then, a source
    that is used up starts again.
    """
    if len(sources) == 1:
        return sources[0]
    if weights is None:
        return concatenate_datasets(sources)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(
        sources, probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )


def identify(path: str, streaming: bool = False) -> str:
    """Returns what identifies a source: its hub name, or the sha256 of its files.

    The sha256 covers names and contents, or names and sizes if the source is streamed.
    """
    files = local_files(path)
    return f"hub:{path}" if files is None else f"sha256:{digest_of(files, contents=not streaming)}"


def examples_digest(examples: "Dataset | ExampleStream | None") -> str:
    """Returns a sha256 over all ids, labels and weights of a set of examples.

    It does not depend on how the set is cached. A stream is not read.
    """
    total = sha256()
    if isinstance(examples, Dataset):
        for batch in examples.with_format("arrow").iter(batch_size=10_000):
            for name in EXAMPLE if "weights" in batch.column_names else EXAMPLE[:2]:
                lists = batch[name].combine_chunks()
                for values in (lists.value_lengths(), lists.flatten()):
                    total.update(values.to_numpy())
    return total.hexdigest()


class ExampleStream(torch.utils.data.IterableDataset):
    """A stream of examples, which every rank reads as a whole.

    Each rank takes its part of each batch, so a step sees the same examples for every number of
    processes. Accelerate would give each rank different files of a stream of ``datasets``; this
    class keeps it from doing so.

    Args:
        templates: the names of the templates that write the prompts.
    """

    def __init__(self, stream: IterableDataset, templates: list[str]):
        self.stream, self.templates = stream, templates

    def __iter__(self) -> Iterator[dict]:
        yield from self.stream

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)
