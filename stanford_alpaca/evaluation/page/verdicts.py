"""The measures of several models as a table, and their differences.

The table says which model is the best, where that is more than chance.
"""

from typing import Any

from stanford_alpaca.evaluation.comparison import CANNOT_MEASURE, SIGNIFICANT

# measures whose names start with one of these are better if higher
HIGHER = ("token_accuracy", "exact_match", "mauve", "rouge_")
# these measures are better if lower
LOWER = (
    "nll", "emo", "perplexity", "ece", "costly_mass", "oracle_perplexity", "forward_cross_entropy",
    "reverse_cross_entropy", "total_variation", "transport_cost", "optimal_transport",
    "energy_distance",
)  # fmt: skip


def better(measure: str) -> int:
    """Returns 1 if higher is better, -1 if lower is better, and 0 if neither is."""
    return 1 if measure.startswith(HIGHER) else -1 if measure.partition(" (")[0] in LOWER else 0


def table_of(evaluation: dict[str, Any], models: list[str], references: str = "") -> dict[str, Any]:
    """Returns the rows of both tables, with columns in the order of ``models``.

    Args:
        references: the name under which the references were measured.

    Returns:
        ``rows``: {measure, better, cells, references, best} for each measure. ``cells`` has [value,
            low, high] or null for each model, and ``references`` is such a cell. ``best`` is the
            index of the model that is better than every other with p < SIGNIFICANT, or null.
        ``pairs``: [model, minus] for each column of ``differences``.
        ``differences``: {measure, better, cells} for each measure with p or a verdict for a pair.
            ``cells`` has {mean, low, high, p, verdict} or null for each pair.
    """
    results = [evaluation["results"].get(model, {}) for model in models]
    theirs = evaluation["results"].get(references, {})
    measures = list(dict.fromkeys(name for result in results for name in result))
    pairs, found = [], []
    for difference in evaluation["differences"]:
        if difference["model"] in models and difference["minus"] in models:
            pairs.append([models.index(difference["model"]), models.index(difference["minus"])])
            found.append(difference["measures"])
    rows = [
        {
            "measure": name,
            "better": better(name),
            "cells": [_cell(result.get(name)) for result in results],
            "references": _cell(theirs.get(name)),
            "best": _best(
                name,
                [place for place, result in enumerate(results) if name in result],
                pairs,
                found,
            ),
        }
        for name in measures
    ]
    differences = [
        {
            "measure": name,
            "better": better(name),
            "cells": [measured.get(name) for measured in found],
        }
        for name in measures
        if any(_told(measured.get(name) or {}) for measured in found)
    ]
    return {"rows": rows, "pairs": pairs, "differences": differences}


def _told(difference: dict[str, Any]) -> bool:
    return difference.get("p") is not None or bool(difference.get("verdict"))


def _cell(measured: dict[str, float | None] | None) -> list[float | None] | None:
    return None if measured is None else [measured["value"], measured["low"], measured["high"]]


def _best(
    measure: str, places: list[int], pairs: list[list[int]], found: list[dict[str, dict[str, Any]]]
) -> int | None:
    """Returns the index of the model that beats each of the others, if there is one."""
    beats: dict[int, set[int]] = {place: set() for place in places}
    for (model, minus), measured in zip(pairs, found, strict=True):
        difference = measured.get(measure)
        if difference is None or difference["p"] is None or difference["p"] >= SIGNIFICANT:
            continue
        if difference.get("verdict") == CANNOT_MEASURE:
            continue
        gain = difference["mean"] * better(measure)
        if gain:
            winner, loser = (model, minus) if gain > 0 else (minus, model)
            beats[winner].add(loser)
    return next(
        (place for place in places if len(places) > 1 and beats[place] >= set(places) - {place}),
        None,
    )
