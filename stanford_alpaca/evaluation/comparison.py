"""Measures of models in the form of JSON: values with intervals, and differences between models.

NaN becomes null.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.intervals import Difference, Items, Replicates
from stanford_alpaca.evaluation.measures.energy import Clouds

Measure = Items | Replicates | Clouds | int | float  # int and float have no interval
Measures = dict[str, Measure]
SIGNIFICANT = 0.05
CANNOT_MEASURE = "cannot measure"


@dataclass(frozen=True)
class Margins:
    """How large a difference has to be to matter.

    Attributes:
        share: of the value of the model that is subtracted, for every measure that has none of its
            own; None for no margin.
        own: a margin for each of some measures, in its unit.
    """

    share: float | None = None
    own: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> "Margins":
        """Reads ``1%``, ``nll=0.01,emo=0.005`` or both, separated by commas.

        Raises:
            UserError: anything else.
        """
        share, own = None, {}
        for part in (text or "").split(",") if text is not None else []:
            name, equals, number = (each.strip() for each in part.rpartition("="))
            relative = not equals and number.endswith("%")
            try:
                value = float(number.removesuffix("%") if relative else number)
            except ValueError:
                value = -1.0
            if not 0 < value < math.inf or not (relative or name):
                raise UserError(
                    f"--margin {text}: give NAME=NUMBER for a measure, PERCENT% for all others, "
                    "or several with commas, as nll=0.01,1%"
                )
            if relative:
                share = value / 100
            else:
                own[name] = value
        return cls(share, own)

    def of(self, measure: str, base: float) -> float | None:
        """Returns the margin of a measure; ``base`` is the value that is subtracted."""
        own = self.own.get(measure, self.own.get(measure.partition(" (")[0]))
        return own if own is not None or self.share is None else self.share * abs(base)


def tell_unknown(margins: Margins, found: dict[str, Measures]) -> None:
    """Prints a line for every margin whose measure was not measured."""
    names = list(dict.fromkeys(name for measures in found.values() for name in measures))
    known = {*names, *(name.partition(" (")[0] for name in names)}
    for name in margins.own:
        if name not in known:
            say(f"--margin {name}: no such measure; there are {', '.join(names)}")


def with_intervals(found: dict[str, Measures]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns value, low and high for every model and measure."""
    return {
        name: {measure: _measured(value) for measure, value in of.items()}
        for name, of in found.items()
    }


def compare(
    found: dict[str, Measures],
    margins: Margins | None = None,
    floors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Returns the differences of every pair of models: the later one minus the earlier one.

    A difference has mean, low, high, p and a verdict (see ``verdict``). Measures that cannot be
    paired are left out.

    Args:
        floors: for some measures, a difference that noise alone makes.
    """
    margins, floors = margins or Margins(), floors or {}
    pairs = []
    for first, other in combinations(found, 2):
        measures = {}
        for measure, value in found[other].items():
            base = found[first].get(measure)
            difference = _difference(value, base)
            if difference is not None:
                margin = margins.of(measure, _value(base))
                judged = verdict(difference, margin, floors.get(measure))
                measures[measure] = _as_json(difference._asdict()) | {"verdict": judged}
        pairs.append({"model": other, "minus": first, "measures": measures})
    return pairs


def verdict(found: Difference, margin: float | None = None, floor: float | None = None) -> str:
    """Returns what a difference shows.

    ``seen``: its interval leaves 0 out. ``seen below the margin``: it does, and lies within the
    margin. ``not seen``: the interval has 0 and lies within the margin. ``inconclusive``: anything
    else. ``cannot measure``: it is not larger than the floor of noise. A difference without an
    interval is judged by p. Without both there is no verdict.
    """
    if floor is not None and abs(found.mean) <= floor:
        return CANNOT_MEASURE
    if math.isnan(found.low):
        if math.isnan(found.p):
            return ""
        return "seen" if found.p < SIGNIFICANT else "inconclusive"
    within = margin is not None and -margin < found.low and found.high < margin
    if found.low > 0 or found.high < 0:
        return "seen below the margin" if within else "seen"
    return "not seen" if within else "inconclusive"


def _value(base: Measure | None) -> float:
    if isinstance(base, int | float) or base is None:
        return float(base or 0)
    return base.measured().value


def _difference(value: Measure, base: Measure | None) -> Difference | None:
    """Returns the paired difference, or None if the two values cannot be paired.

    Numbers without an interval cannot be paired. Neither can running text in blocks of two
    different tokenizers, because their blocks are not the same.
    """
    if isinstance(value, Items) and isinstance(base, Items) and len(value.sums) == len(base.sums):
        return value.minus(base)
    if isinstance(value, Replicates) and isinstance(base, Replicates):
        return value.minus(base)
    if isinstance(value, Clouds) and isinstance(base, Clouds):
        return value.minus(base)
    return None


def _measured(value: Measure) -> dict[str, float | None]:
    if isinstance(value, Items | Replicates | Clouds):
        return _as_json(value.measured()._asdict())
    return {"value": value, "low": None, "high": None}


def _as_json(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(number) else number for name, number in numbers.items()}
