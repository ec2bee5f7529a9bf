"""Tables over seeds: means, and differences paired by seed.

A run is a dict with setting, arm, seed, and measures {name: value}. A table is a list of rows, the
head first.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stanford_alpaca.evaluation.intervals import Replicates

Run = dict[str, Any]
Table = list[list[str]]


def means_of(runs: list[Run]) -> Table:
    """Returns a row per arm and a column per measure: mean ± standard deviation over the seeds."""
    names = list(dict.fromkeys(name for run in runs for name in run["measures"]))
    rows = [
        [arm, *(_spread(values_of(runs, arm, name)) for name in names)] for arm in each(runs, "arm")
    ]
    return [["", *map(shown, names)], *rows]


def differences_of(runs: list[Run], base: str) -> Table:
    """Returns each arm minus the base, paired by seed.

    Each difference has Student's 95 % interval, with a * if the interval excludes 0.
    """
    names = [name for name in runs[-1]["measures"] if len(values_of(runs, base, name)) > 1]
    rows = [
        [f"{arm} - {base}", *(_gain(runs, arm, base, name) for name in names)]
        for arm in each(runs, "arm")
        if arm != base and names and len(values_of(runs, arm, names[0])) > 1
    ]
    return [["", *map(shown, names)], *rows]


def rates_of(trials: Iterable[Mapping[str, Any]]) -> Table:
    """Returns nll on the development set, a row per loss."""
    by_loss: dict[str, dict[float, float]] = {}
    for trial in trials:
        by_loss.setdefault(trial["loss"], {})[trial["learning_rate"]] = trial["development_nll"]
    rows = [[loss, *bold(nll)] for loss, nll in by_loss.items()]
    return [["", *[""] * (max(map(len, rows)) - 1)], *rows]


def bold(nlls: Mapping[float, float]) -> list[str]:
    """Returns nll by learning rate as text, the least in bold.

    A ! marks the least if it belongs to the lowest or highest rate of several.
    """
    best = min(nlls, key=lambda rate: (math.isnan(nlls[rate]), nlls[rate]))
    edge = "!" if len(nlls) > 1 and best in (min(nlls), max(nlls)) else ""
    return [
        f"**{rate:g}: {nll:.4f}{edge}**" if rate == best else f"{rate:g}: {nll:.4f}"
        for rate, nll in nlls.items()
    ]


def each(runs: list[Run], key: str) -> list[str]:
    """Returns the values of a key, each once."""
    return list(dict.fromkeys(run[key] for run in runs))


def values_of(runs: list[Run], arm: str, name: str) -> list[float]:
    """Returns a measure of an arm, in the order of the seeds."""
    return list(_by_seed(runs, arm, name).values())


def shown(name: str) -> str:
    """Returns a measure's name in words."""
    return name.replace("_", " ")


def _by_seed(runs: list[Run], arm: str, name: str) -> dict[int, float]:
    found = {run["seed"]: run["measures"].get(name) for run in runs if run["arm"] == arm}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    digits = _digits(statistics.mean(values))
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _gain(runs: list[Run], arm: str, base: str, name: str) -> str:
    both = [_by_seed(runs, one, name) for one in (arm, base)]
    seeds = sorted(set(both[0]) & set(both[1]))
    ours, theirs = (np.array([values[seed] for seed in seeds]) for values in both)
    gain = Replicates(ours).minus(Replicates(theirs))
    digits = _digits(float(theirs.mean()))
    if np.isnan(gain.low):
        return f"{gain.mean:+.{digits}f}"
    clear = " *" if gain.low > 0 or gain.high < 0 else ""
    return f"{gain.mean:+.{digits}f} [{gain.low:+.{digits}f}, {gain.high:+.{digits}f}]{clear}"


def _digits(size: float) -> int:
    return 1 if abs(size) >= 10 else 4
