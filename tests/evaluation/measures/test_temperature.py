"""Matching entropies: a model at another temperature is that model again, on the other half."""

import numpy as np
import pytest

from stanford_alpaca.evaluation.measures.forced import BINS, Forced
from stanford_alpaca.evaluation.measures.temperature import (
    TEMPERATURES,
    curve_of,
    matched,
)

V, RECORDS, TOKENS = 30, 60, 5


def sums(logits, targets, costs, temperature, temperatures=()):
    """Returns the sums of a model with these logits [RECORDS, TOKENS, V], in plain numpy."""

    def at(tau):
        p = np.exp(logits / tau)
        p /= p.sum(2, keepdims=True)
        chosen = np.take_along_axis(p, targets[..., None], 2)[..., 0]
        emo, entropy = (p * costs[targets]).sum(2), -(p * np.log(p)).sum(2)
        return [each.sum(1) for each in (-np.log(chosen), emo, entropy, p.max(2))]

    nll, emo, entropy, costly = at(temperature)
    curve = np.stack([np.stack(at(tau), 1) for tau in temperatures], 1) if temperatures else None
    tokens, bins = np.full(RECORDS, float(TOKENS)), np.zeros((RECORDS, BINS, 3))
    columns = (tokens, nll, emo, tokens, costly, entropy, bins)
    return Forced(*columns) if curve is None else Forced(*columns, curve)


@pytest.fixture
def world():
    random = np.random.default_rng(0)
    logits = random.normal(size=(RECORDS, TOKENS, V)) * 2
    targets = random.integers(0, V, (RECORDS, TOKENS))
    points = random.normal(size=(V, 3))
    return logits, targets, np.linalg.norm(points[:, None] - points, axis=2)


def test_the_temperature_is_found_and_measures_are_those_at_it_on_the_other_half(world):
    logits, targets, costs = world
    # the other model is this one at 0.7, so that is the temperature, whatever the half
    other = sums(logits, targets, costs, 0.7)
    found = matched(sums(logits, targets, costs, 1.0, TEMPERATURES), other)
    assert found["temperature"].value == pytest.approx(0.7, abs=2e-5)
    half = np.arange(1, RECORDS, 2)
    tokens = other.tokens[half].sum()
    want = {
        "nll": other.nll[half].sum() / tokens,
        "emo": other.emo[half].sum() / tokens,
        "entropy": other.entropy[half].sum() / tokens,
        "costly_mass": other.costly[half].sum() / tokens,
        "perplexity": np.exp(other.nll[half].sum() / tokens),
    }
    for name, value in want.items():
        assert found[name].value == pytest.approx(value, rel=5e-5), name
    # in every resample it is that temperature again: its interval has no width
    measured = found["temperature"].measured()
    assert (measured.low, measured.high) == pytest.approx((0.7, 0.7), abs=5e-5)


def test_intervals_include_the_fit(world):
    logits, targets, costs = world
    other = sums(np.random.default_rng(1).normal(size=logits.shape), targets, costs, 1.0)
    model = sums(logits, targets, costs, 1.0, TEMPERATURES)
    found = matched(model, other)
    assert found["temperature"].value > 1.5
    low, high = found["temperature"].measured()[1:]
    # a bootstrap by hand: halves are resampled together, the temperature is fitted by bisection
    random, fitted = np.random.default_rng(5), []
    for _ in range(300):
        chosen = random.integers(0, RECORDS, RECORDS)
        chosen = chosen[chosen % 2 == 0]
        wanted = other.entropy[chosen].sum()
        curve = model.curve[chosen, :, 2].sum(0)
        fitted.append(np.exp(np.interp(wanted, curve, np.log(TEMPERATURES))))
    assert (low, high) == pytest.approx(tuple(np.quantile(fitted, [0.025, 0.975])), rel=0.02)
    difference = found["nll"].minus(matched(model, other)["nll"])
    assert (difference.low, difference.mean, difference.high) == (0, 0, 0)


def test_an_entropy_out_of_reach_is_an_error(world):
    logits, targets, costs = world
    model = sums(logits, targets, costs, 1.0, TEMPERATURES)
    with pytest.raises(ValueError, match=r"an entropy of 3\.4.* is outside"):
        matched(model, sums(logits * 0, targets, costs, 1.0))


def test_curves_are_means_over_tokens(world):
    logits, targets, costs = world
    found = curve_of(sums(logits, targets, costs, 1.0, TEMPERATURES), range(3, 7))
    alone = sums(logits, targets, costs, TEMPERATURES[2])
    for name in ("nll", "emo", "entropy"):
        want = getattr(alone, name)[3:7].sum() / (4 * TOKENS)
        assert found[name][2] == pytest.approx(want)
    assert found["temperature"][2] == TEMPERATURES[2]


def test_a_confident_model_has_its_own_entropy_at_1(world):
    """Its values span decades over the temperatures, and most tokens have next to no entropy."""
    logits, targets, costs = world
    sharp = logits * 6
    found = matched(sums(sharp, targets, costs, 1.0, TEMPERATURES), sums(sharp, targets, costs, 1))
    assert found["temperature"].value == pytest.approx(1, abs=1e-9)
    other = sums(sharp, targets, costs, 1.13)
    found = matched(sums(sharp, targets, costs, 1.0, TEMPERATURES), other)
    assert found["temperature"].value == pytest.approx(1.13, abs=2e-4)
    want = other.costly[1::2].sum() / other.tokens[1::2].sum()
    assert found["costly_mass"].value == pytest.approx(want, rel=1e-3)
