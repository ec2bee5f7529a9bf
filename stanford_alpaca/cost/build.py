"""Makes a cost embedding from text or from another model, writes it to a file, and describes it."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from stanford_alpaca import __version__
from stanford_alpaca.checkpoint.files import new_file
from stanford_alpaca.cost.cooccurrence import TextSettings, count_pairs, embed
from stanford_alpaca.cost.embedding import CostEmbedding
from stanford_alpaca.cost.transfer import transfer_rows
from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.reading import (
    DATA_SUFFIXES,
    kind_of_file,
    lines_of,
    open_text,
    read_file,
    readable,
    too_large,
)
from stanford_alpaca.data.records import FORMS, form_of, parse_record
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import RECORD_LIMIT
from stanford_alpaca.models.load import ModelSource

CHUNK = 1 << 22  # characters that are tokenized and counted at a time
SHOWN, NEIGHBOURS = 6, 5  # tokens in the description, and nearest tokens of each


def documents(file: Path) -> Iterator[str]:
    """Yields the texts of a file. Tokens count as near each other only within one text.

    Each record of a data file (see ``data.formats``) is one text, with a line for each field or
    message. Any other file is split into paragraphs if it has blank lines between them, else into
    lines.
    """
    if kind_of_file(file) in DATA_SUFFIXES:
        for where, value in read_file(file):
            record = parse_record(value, where, needs_output=False)
            texts = (
                [m["content"] for m in record["messages"]]
                if "messages" in record
                else [record[name] for name in FORMS[form_of(record)] if name != "more"]
            )
            yield "\n".join(text for text in texts if text)
        return
    with readable(file):
        with open_text(file) as stream:
            lines = lines_of(stream, file)
            in_paragraphs = sum(is_text for is_text, _ in groupby(lines, _is_text)) > 1
        with open_text(file) as stream:
            for is_text, group in groupby(lines_of(stream, file), _is_text):
                if is_text and in_paragraphs:
                    yield _paragraph(group, file).strip("\n")
                elif is_text:
                    yield from (line.strip("\n") for line in group)


def _paragraph(lines: Iterable[str], file: Path) -> str:
    """Joins lines. Raises UserError if they become larger than a record."""
    found, size = [], 0
    for line in lines:
        found.append(line)
        size += len(line)
        if size > RECORD_LIMIT.mib << 20:
            raise too_large(f"{file}:a paragraph")
    return "".join(found)


def _is_text(line: str) -> bool:
    return bool(line.strip())


def _token_chunks(
    files: list[Path], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[list[int]]]:
    """Yields token ids of whole documents, about CHUNK characters at a time.

    Text that looks like a special token is encoded as text, as in training.
    """
    encoder = TextEncoder.of(tokenizer)
    texts: list[str] = []
    size = 0
    for file in files:
        for text in documents(file):
            texts.append(text)
            size += len(text)
            if size >= CHUNK:
                yield [ids for ids, _ in encoder(texts, add_special_tokens=False)]
                texts, size = [], 0
    if texts:
        yield [ids for ids, _ in encoder(texts, add_special_tokens=False)]


def from_text(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, vocab_size: int, settings: TextSettings
) -> tuple[np.ndarray, np.ndarray, str]:
    """Computes rows from text.

    Returns:
        Rows [V, width] float32, the ids of the seen tokens from the most frequent one on, and a
        report of what was done.

    Raises:
        UserError: a file that is not text, or too little text.
    """
    began = perf_counter()
    pairs, counts = count_pairs(_token_chunks(files, tokenizer), vocab_size, settings.window)
    counted = perf_counter()
    if not counts.any():
        raise UserError(f"--text {' '.join(map(str, files))}: there is no text in it")
    wanted = counts >= settings.min_count
    wanted[tokenizer.all_special_ids] = False  # such as the unknown token, which stands for many
    rows, explained = embed(pairs, wanted, settings)
    tokens, ended = int(counts.sum()), perf_counter()
    report = (
        f"{tokens:,} tokens, {pairs.nnz:,} different pairs at most {settings.window} apart, "
        f"weighted 1/distance; tokenized and counted in {counted - began:.1f} s "
        f"({tokens / (counted - began):,.0f} tokens/s), decomposed in "
        f"{ended - counted:.1f} s; explained share {explained:.1%}"
    )
    order = np.argsort(-counts, kind="stable")
    return rows, order[wanted[order]], report


def from_head(
    model: str,
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase | None,
    vocab_size: int | None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Takes rows from a model's output embedding.

    Without a target tokenizer and a vocabulary size, there is a row for each of the model's own
    logits.

    Returns:
        Rows [V, D] float32, the ids from 0 on, and a report of what was done.
    """
    head = ModelSource(model).load().get_output_embeddings()
    if head is None:
        raise UserError(f"--head {model}: this model has no output embedding")
    weight = head.weight.detach().numpy()
    size = vocab_size or (max(len(weight), len(source)) if target is None else len(target))
    rows, matches = transfer_rows(weight, source, target or source, size)
    report = (
        f"{matches.exact:,} rows of tokens with the same text, "
        f"{matches.averaged:,} means of the pieces of a token, "
        f"{matches.special:,} special tokens by their role, {matches.zero:,} left zero"
    )
    return rows, np.arange(min(size, len(target or source))), report


def save(rows: np.ndarray, out: Path, **metadata: str) -> None:
    """Writes the file that ``CostEmbedding.from_file`` reads, with the metadata in its header."""
    about = {**metadata, "stanford_alpaca": __version__}
    with new_file(out) as part:
        save_file({"cost_embedding": rows}, part, metadata=about)


def describe(rows: np.ndarray, order: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns how many rows there are, and which tokens are nearest to some words.

    These are the first words of at least four letters in ``order``.
    """
    filled = np.count_nonzero(rows, axis=1) > 0
    lines = [
        f"{len(rows):,} rows of {rows.shape[1]}: "
        f"{filled.sum():,} with data, {(~filled).sum():,} of zeros"
    ]
    cost = CostEmbedding(torch.from_numpy(rows))
    seen = (token for token in order.tolist() if filled[token])
    return "\n".join([*lines, *neighbours(cost, first_words(seen, tokenizer), tokenizer)])


def first_words(order: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the first SHOWN tokens that are words of at least four letters."""
    return list(islice((t for t in order if _is_word(tokenizer.decode([t]))), SHOWN))


def neighbours(
    cost: CostEmbedding, tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yields a line for each token: the tokens that cost least to move to it, with their costs."""
    assert cost.rows is not None and cost.directed is not None
    for token in tokens:
        costs = cost.costs(torch.tensor([token]), len(cost.rows))[0]
        order = costs.argsort(stable=True).tolist()
        near = [each for each in order if each != token and cost.directed[each]][:NEIGHBOURS]
        shown = ", ".join(f"{tokenizer.decode([each])!r} {costs[each]:.2f}" for each in near)
        yield f"  nearest to {tokenizer.decode([token])!r} (cost): {shown}"


def _is_word(text: str) -> bool:
    return len(text.strip()) >= 4 and text.strip().isalpha()
