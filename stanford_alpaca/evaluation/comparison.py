"""Measures of models in the form of JSON: values with intervals, and differences between models.

NaN becomes null.
"""

import math
from itertools import combinations
from typing import Any

from stanford_alpaca.evaluation.intervals import Difference, Items, Replicates

Measure = Items | Replicates | int | float  # int and float have no interval
Measures = dict[str, Measure]


def with_intervals(found: dict[str, Measures]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns value, low and high for every model and measure."""
    return {
        name: {measure: _measured(value) for measure, value in of.items()}
        for name, of in found.items()
    }


def compare(found: dict[str, Measures]) -> list[dict[str, Any]]:
    """Returns the differences of every pair of models: the later one minus the earlier one.

    A difference has mean, low, high and p. Measures that cannot be paired are left out.
    """
    pairs = []
    for first, other in combinations(found, 2):
        differences = {
            measure: _difference(value, found[first].get(measure))
            for measure, value in found[other].items()
        }
        measures = {
            measure: _as_json(found._asdict())
            for measure, found in differences.items()
            if found is not None
        }
        pairs.append({"model": other, "minus": first, "measures": measures})
    return pairs


def _difference(value: Measure, base: Measure | None) -> Difference | None:
    """Returns the paired difference, or None if the two values cannot be paired.

    Numbers without an interval cannot be paired. Neither can running text in blocks of two
    different tokenizers, because their blocks are not the same.
    """
    if isinstance(value, Items) and isinstance(base, Items) and len(value.sums) == len(base.sums):
        return value.minus(base)
    return (
        value.minus(base)
        if isinstance(value, Replicates) and isinstance(base, Replicates)
        else None
    )


def _measured(value: Measure) -> dict[str, float | None]:
    if isinstance(value, Items | Replicates):
        return _as_json(value.measured()._asdict())
    return {"value": value, "low": None, "high": None}


def _as_json(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(number) else number for name, number in numbers.items()}
