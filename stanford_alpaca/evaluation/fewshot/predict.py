"""A model's predictions on a task: chooses examples, encodes prompts, scores the classes."""

import math
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.evaluation.fewshot.prompting import Choices, encode_choices
from stanford_alpaca.evaluation.fewshot.retrieval import (
    SIMILAR,
    Featurize,
    draw,
    draw_pool,
    nearest_examples,
)
from stanford_alpaca.evaluation.fewshot.scoring import Scores
from stanford_alpaca.evaluation.fewshot.scoring import score as log_likelihoods
from stanford_alpaca.evaluation.fewshot.tasks import TaskData

SCORES = ("likelihood", "perplexity")
Seed = int | None  # None: the choice of examples depends on no seed
# for every seed and test item, training records in the order of the prompt
Examples = dict[Seed, list[list[int]]]


class FewShotSettings(NamedTuple):
    """What decides the prompts and the scores, besides tasks and models."""

    shots: int
    retriever: str  # one of ``retrieval.RETRIEVERS``
    pool: int | None
    seeds: list[Seed]
    score: str  # one of ``SCORES``
    batch_size: int | None = None


def choose_examples(
    data: TaskData, settings: FewShotSettings, featurize: Featurize | None
) -> Examples:
    """Returns the examples of every test item, for every seed.

    ``featurize`` is needed if they are chosen by similarity.
    """
    size, items = len(data.train.texts), len(data.test.texts)
    if settings.retriever not in SIMILAR or not settings.shots:
        return {
            seed: draw(settings.retriever, seed or 0, items, size, settings.shots)
            for seed in settings.seeds
        }
    assert featurize is not None
    try:
        train, test = featurize(data.train.texts, data.test.texts)
    except ValueError as error:  # from scikit-learn: the vocabulary has no words
        raise UserError(
            f"task {data.task.name}: --retriever {settings.retriever} cannot compare these texts "
            f"({first_line(error)}); take model or random"
        ) from None
    pools = {
        seed: None if settings.pool is None else draw_pool(seed or 0, size, settings.pool)
        for seed in settings.seeds
    }
    return {
        seed: nearest_examples(train, test, settings.shots, pool) for seed, pool in pools.items()
    }


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    examples: Examples,
    settings: FewShotSettings,
) -> list[dict[str, Any]]:
    """Returns a row per seed and test item.

    A row holds the item, the prediction, each class's score, and the examples in the prompt.
    """
    rows = []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for seed, chosen in examples.items():
        name = data.task.name if seed is None else f"{data.task.name}, seed {seed}"
        choices = encode_choices(tokenizer, data, chosen, positions)
        cut = sum(len(item.examples) < settings.shots for item in choices)
        if cut:
            say(
                f"{name}: {cut} of {len(choices)} prompts are too long for {positions} positions, "
                "and have fewer examples"
            )
        scores = _scores(model, choices, settings, name)
        for i, (item, row) in enumerate(zip(choices, scores, strict=True)):
            if not all(map(math.isfinite, row)):
                raise UserError(
                    f"{name}: the scores of test record {i + 1} are {row}: "
                    "the model computes no numbers"
                )
            rows.append(
                {
                    "task": data.task.name,
                    "seed": seed,
                    "item": i,
                    "text": data.test.texts[i],
                    "label": data.test.labels[i],
                    "prediction": row.index(max(row)),
                    "scores": row,
                    "examples": item.examples,
                }
            )
    return rows


def _scores(
    model: PreTrainedModel, choices: list[Choices], settings: FewShotSettings, name: str
) -> Scores:
    """Returns log p of what differs between the classes.

    Under ``perplexity`` it returns the mean log p of a prompt's tokens.
    """
    whole = settings.score == "perplexity"
    scores = log_likelihoods(model, choices, settings.batch_size, whole, name)
    if not whole:
        return scores
    lengths = [[len(item.context) + len(ending) - 1 for ending in item.endings] for item in choices]
    return [
        [total / tokens for total, tokens in zip(*pair, strict=True)]
        for pair in zip(scores, lengths, strict=True)
    ]
