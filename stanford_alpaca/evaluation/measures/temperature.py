"""Compares models at one entropy: each at the temperature at which it is as sure as another model.

Confidence alone changes nll, emo and costly mass, whatever a model has learned. So each model gets
the temperature tau at which the mean entropy of its next-token distributions equals that of a given
model at temperature 1. tau is fitted on one half of the examples (the first, the third, ...), and
the measures are those of the other half. A resample of the examples fits tau again, so intervals
include how uncertain tau is.
"""

from collections.abc import Callable

import numpy as np
from scipy.interpolate import CubicSpline

from stanford_alpaca.evaluation.intervals import Items
from stanford_alpaca.evaluation.measures.forced import Forced

TEMPERATURES = tuple(2 ** (k / 3) for k in range(-9, 8))  # of the curves, from 0.125 to 5.04
REFITTED = ("temperature", "nll", "perplexity", "emo", "costly_mass", "entropy")
FINE = 2049  # places between them at which a curve is interpolated
OF_CURVE = ("nll", "emo", "entropy", "costly_mass")  # of ``Forced.curve``
TINY = 1e-12  # smaller values are interpolated as this
AROUND = np.linspace(np.log(TEMPERATURES[0]), np.log(TEMPERATURES[-1]), FINE)


def fit_half(count: int) -> range:
    """Returns the places of the examples that temperatures are fitted on."""
    return range(0, count, 2)


def measured_half(count: int) -> range:
    """Returns the places of the other examples."""
    return range(1, count, 2)


def matched(forced: Forced, other: Forced) -> dict[str, Items]:
    """Returns the measures of a model at the entropy of another one, and the temperature.

    Both have the sums of all examples, and ``forced`` has a curve over TEMPERATURES.

    Raises:
        ValueError: no temperature of TEMPERATURES gives this entropy.
    """
    count, points = len(forced.tokens), len(TEMPERATURES)
    fit, rest = np.array(fit_half(count)), np.array(measured_half(count))
    found = {}
    for name in REFITTED:
        column = OF_CURVE.index("nll" if name in ("temperature", "perplexity") else name)
        sums = np.zeros((count, 4 + 2 * points))
        sums[fit, :3] = np.stack([forced.tokens, other.tokens, other.entropy], 1)[fit]
        sums[fit, 3 : 3 + points] = forced.curve[fit, :, OF_CURVE.index("entropy")]
        sums[rest, 3 + points] = forced.tokens[rest]
        sums[rest, 4 + points :] = forced.curve[rest, :, column]
        found[name] = Items(sums, OF.get(name, _at_fitted))
    (wanted,), entropies, _ = _split(found["nll"].sums.sum(0)[None])
    low, high = entropies[0, [0, -1]]
    if not low <= wanted <= high:
        raise ValueError(
            f"an entropy of {wanted:.3f} is outside {low:.3f} to {high:.3f}, what temperatures "
            f"from {TEMPERATURES[0]:g} to {TEMPERATURES[-1]:g} give"
        )
    return found


def curve_of(forced: Forced, places: range | None = None) -> dict[str, list[float]]:
    """Returns OF_CURVE at each temperature, as means over the tokens of these examples."""
    chosen = slice(None) if places is None else np.array(places)
    tokens = forced.tokens[chosen].sum()
    means = forced.curve[chosen].sum(0) / max(tokens, 1)
    return {"temperature": list(TEMPERATURES)} | {
        name: means[:, place].tolist() for place, name in enumerate(OF_CURVE)
    }


def _temperature(sums: np.ndarray) -> np.ndarray:  # [..., k] -> [...]
    return np.exp(_rows(_fitted, sums))


def _at_fitted(sums: np.ndarray) -> np.ndarray:  # [..., k] -> [...]
    return _rows(_values, sums)


def _perplexity(sums: np.ndarray) -> np.ndarray:  # [..., k] -> [...]
    return np.exp(np.minimum(_at_fitted(sums), 700.0))


OF: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "temperature": _temperature,
    "perplexity": _perplexity,
}


def _rows(of: Callable[[np.ndarray], np.ndarray], sums: np.ndarray) -> np.ndarray:
    return of(sums.reshape(-1, sums.shape[-1])).reshape(sums.shape[:-1])


def _split(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the wanted entropy [r], the entropies [r, points] and the other curve [r, points]."""
    points = len(TEMPERATURES)
    own, theirs, measured = (np.maximum(sums[:, place], 1) for place in (0, 1, 3 + points))
    return (
        sums[:, 2] / theirs,
        sums[:, 3 : 3 + points] / own[:, None],
        sums[:, 4 + points :] / measured[:, None],
    )


def _fine(curves: np.ndarray) -> np.ndarray:  # [r, points] -> [r, FINE]
    """Interpolates by a cubic spline of logarithms: a confident model's values span decades."""
    logs = np.log(np.maximum(curves, TINY))
    return np.exp(CubicSpline(np.log(TEMPERATURES), logs, axis=1)(AROUND))


def _places(sums: np.ndarray) -> np.ndarray:  # [r, k] -> [r] places, in units of AROUND
    wanted, entropies, _ = _split(sums)
    values, rows = _fine(entropies), np.arange(len(sums))
    after = (values < wanted[:, None]).sum(1).clip(1, FINE - 1)  # entropy grows with temperature
    low, high = values[rows, after - 1], values[rows, after]
    return after - 1 + np.clip((wanted - low) / np.where(high > low, high - low, 1), 0, 1)


def _fitted(sums: np.ndarray) -> np.ndarray:  # [r, k] -> [r] log temperature
    return np.interp(_places(sums), np.arange(FINE), AROUND)


def _values(sums: np.ndarray) -> np.ndarray:  # [r, k] -> [r]
    places, curve = _places(sums), _fine(_split(sums)[2])
    before, rows = np.minimum(places.astype(int), FINE - 2), np.arange(len(sums))
    low, high = curve[rows, before], curve[rows, before + 1]
    return low + (places - before) * (high - low)
