"""Loads the examples that a run trains and evaluates on."""

import math
import os
from dataclasses import replace

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.console import say
from stanford_alpaca.data.formats import check_columns, several_files
from stanford_alpaca.data.sources import (
    ExampleStream,
    Loading,
    check_sources,
    load_source,
    mix,
    stream_sources,
)
from stanford_alpaca.data.templates import IN_WORDS, sign, told_templates
from stanford_alpaca.errors import UserError
from stanford_alpaca.run.arguments import DataArguments, TrainingArguments


def load_data(
    data: DataArguments, training: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | ExampleStream, Dataset | None]:
    """Loads training and evaluation data, prints reports, sets the tokenizer's chat template."""
    loading = Loading(
        max_length=training.model_max_length,
        prompt_template=data.prompt_template,
        special_tokens=data.special_tokens,
        train_history=data.train_history,
        columns=data.column_names(),
        cache_dir=training.cache_dir,
        num_proc=data.preprocessing_num_workers or len(os.sched_getaffinity(0)),
        seed=training.seed,
        shuffle_buffer=data.shuffle_buffer,
        block_size=data.block_size,
        documents=data.documents,
        max_sentences=data.max_sentences or None,
        detokenize=data.detokenize,
    )
    evaluating = replace(loading, max_sentences=None)
    templates: dict[str, None] = {}  # those that write the training prompts

    def load(paths: list[str], loading: Loading) -> list[Dataset]:
        sources = []
        for path in paths:
            for line in several_files(path):
                say(line)
            examples, report = load_source(path, tokenizer, loading)
            for line in report.lines():
                say(f"{path}: {line}")
            sources.append(examples)
            if loading is not evaluating and report.template:
                templates[report.template] = None
        return sources

    if data.streaming:
        check_columns([*data.data_path, *(data.eval_path or [])], loading.columns)
    else:  # finds bad records before the slow tokenization starts
        check_sources(data.data_path, loading)
        check_sources(data.eval_path or [], evaluating)
    held_out = (
        mix(load(data.eval_path, evaluating), None, training.seed)
        if data.eval_path is not None
        else None
    )
    if data.streaming:
        stream = stream_sources(data.data_path, data.data_weights, tokenizer, loading, tell=say)
        _sign(tokenizer, stream.templates, data)
        return stream, held_out
    sources = load(data.data_path, loading)
    _sign(tokenizer, list(templates), data)
    if data.eval_fraction is not None:
        seed = None if data.block_size else training.seed
        splits = [hold_out(source, data.eval_fraction, seed) for source in sources]
        sources, held_out = (
            [kept for kept, _ in splits],
            mix([held for _, held in splits], None, training.seed),
        )
        say(f"held out {len(held_out):,} {'blocks' if data.block_size else 'examples'}")
    return mix(sources, data.data_weights, training.seed), held_out


# Makes the chat template that writes the training prompts the tokenizer's own, and says so.
def _sign(tokenizer: PreTrainedTokenizerBase, templates: list[str], data: DataArguments) -> None:
    told = told_templates(templates, tokenizer, data.chat_template)
    if told == [f"prompts: {IN_WORDS[name]}" for name in templates[:1]]:
        told = []  # the summary says it
    for line in [*told, *sign(tokenizer, templates, data.special_tokens)]:
        say(line)


def hold_out(examples: Dataset, fraction: float, seed: int | None) -> tuple[Dataset, Dataset]:
    """Holds out a fraction of the examples: a random one, or without a seed the end.

    Returns the examples to train on and the held-out ones.

    Raises:
        UserError: one of the parts would be empty.
    """
    if not 0 < round(len(examples) * fraction) < len(examples):
        raise UserError(
            f"--eval_fraction {fraction} of {len(examples)} examples leaves one side empty"
        )
    held, order = math.ceil(fraction * len(examples)), np.arange(len(examples))
    if seed is None:
        return examples.select(order[:-held]), examples.select(order[-held:])
    # In memory, because ``datasets`` would read its own permutation back from a file.
    order = np.random.default_rng(seed).permutation(len(examples))
    return examples.select(order[held:]), examples.select(order[:held])
