"""Measures of all models' responses, with the references measured by themselves."""

from collections.abc import Callable

import numpy as np
from datasets import Dataset

from stanford_alpaca.console import say
from stanford_alpaca.data.prompts import as_shown
from stanford_alpaca.data.records import form_of
from stanford_alpaca.evaluation.comparison import Measures
from stanford_alpaca.evaluation.intervals import Replicates
from stanford_alpaca.evaluation.measures.energy import Clouds
from stanford_alpaca.evaluation.measures.mauve import load_featuriser, mauve, mauve_of_halves
from stanford_alpaca.evaluation.measures.texts import (
    against_references,
    by_themselves,
    equal_in_words,
    first_words,
    length,
)
from stanford_alpaca.evaluation.settings import Settings

REFERENCES = "(references)"  # the column for the references measured by themselves
Responses = dict[str, list[list[str]]]  # of a model: decoding -> [seeds][records]
Features = Callable[[str, list[str]], np.ndarray]  # a featuriser, [n] texts -> [n, D]


def measure_responses(
    records: Dataset, responses: dict[str, Responses], settings: Settings
) -> dict[str, Measures]:
    """Returns the measures of every model's responses, and of the references by themselves.

    With several ways of decoding, the name of a measure includes the way. MAUVE of the references
    is that of their two halves, its noise floor.
    """
    if not responses:
        return {}
    references = [compared(as_shown(record)["reference"], settings) for record in records]
    features, halves = features_of(records, settings), None
    found: dict[str, Measures] = {name: {} for name in (*responses, REFERENCES)}
    for decoding, ways in settings.decodings().items():
        whole = {
            name: [[compared(answer, settings) for answer in answers] for answers in of[decoding]]
            for name, of in responses.items()
        }
        wanted, texts = references, whole
        if settings.equal_words:
            wanted, texts = equal_in_words(references, whole)
            if empty := sum(not text for text in wanted):
                say(f"{empty} of {len(wanted)} records have a response without words ({decoding})")
        seeds = [seed for _, seed in ways]
        for name, answers in texts.items():
            measures: Measures = {**against_references(answers, wanted), **by_themselves(answers)}
            measures["length"] = length(whole[name])
            if settings.compared_words is not None or settings.equal_words:
                del measures["exact_match"]  # it depends on where a text is cut
            measures |= of_the_set(answers, wanted, seeds, settings, features)
            found[name] |= {
                settings.named(measure, decoding): value for measure, value in measures.items()
            }
        theirs: Measures = {**by_themselves([wanted]), "length": length([references])}
        if settings.mauve is not None:
            if halves is None or settings.equal_words:  # otherwise all are of the same references
                halves = mauve_of_halves(features(settings.mauve, wanted), settings.mauve_scale)
            theirs["mauve"] = halves
        found[REFERENCES] |= {
            settings.named(name, decoding): value for name, value in theirs.items()
        }
    return found


def of_the_set(
    answers: list[list[str]],  # [seeds][records]
    references: list[str],
    seeds: list[int],
    settings: Settings,
    features: Features,
) -> Measures:
    """Returns the measures that compare all responses with all references, as clouds."""
    measures: Measures = {}
    if settings.mauve is not None:
        theirs = features(settings.mauve, references)
        values = [
            mauve(theirs, features(settings.mauve, texts), seed, settings.mauve_scale)
            for texts, seed in zip(answers, seeds, strict=True)
        ]
        measures["mauve"] = Replicates(np.array(values))
    if settings.energy is not None:
        ours = np.stack([features(settings.energy, texts) for texts in answers])
        clouds = Clouds(features(settings.energy, references), ours)
        measures |= {"energy_distance": clouds, "energy_p": clouds.p()}
    return measures


def features_of(records: Dataset, settings: Settings) -> Features:
    """Returns a function that computes features of responses or references, and keeps them.

    Continuations are compared together with their prompts, answers to instructions alone.
    """
    loaded = {name: load_featuriser(settings.source(name)) for name in settings.featurisers}
    kept: dict[tuple, np.ndarray] = {}

    def features(name: str, texts: list[str]) -> np.ndarray:
        key = (name, *texts)
        if key not in kept:
            kept[key] = loaded[name](_with_prompts(texts, records))
        return kept[key]

    return features


def compared(text: str, settings: Settings) -> str:
    """Returns the part of a response or a reference that is compared."""
    words = settings.compared_words
    return text if words is None else first_words(text, words)


def _with_prompts(texts: list[str], records: Dataset) -> list[str]:
    if form_of(records.column_names) != "completion":
        return texts
    return [
        f"{prompt} {text.strip()}" for prompt, text in zip(records["prompt"], texts, strict=True)
    ]
