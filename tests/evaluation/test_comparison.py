"""Margins and verdicts by hand."""

import numpy as np
import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.comparison import Margins, compare, verdict
from stanford_alpaca.evaluation.intervals import Difference, Replicates, mean_of
from stanford_alpaca.evaluation.measures.energy import Clouds

NAN = float("nan")


@pytest.mark.parametrize(
    ("interval", "margin", "want"),
    [
        ((0.1, 0.3), None, "seen"),
        ((-0.3, -0.1), 0.2, "seen"),
        ((0.1, 0.3), 0.2, "seen"),
        ((0.05, 0.15), 0.2, "seen below the margin"),
        ((-0.15, -0.05), 0.2, "seen below the margin"),
        ((-0.1, 0.1), 0.2, "not seen"),
        ((-0.1, 0.3), 0.2, "inconclusive"),
        ((-0.1, 0.1), None, "inconclusive"),
        ((-0.2, 0.2), 0.2, "inconclusive"),
    ],
)
def test_verdicts(interval, margin, want):
    low, high = interval
    found = Difference((low + high) / 2, low, high, 0.5)
    assert verdict(found, margin) == want
    assert verdict(found, margin, floor=1.0) == "cannot measure"
    assert verdict(found, margin, floor=0.0) == (want if found.mean else "cannot measure")


def test_without_an_interval_p_decides_and_without_p_nothing():
    assert verdict(Difference(1.0, NAN, NAN, 0.04)) == "seen"
    assert verdict(Difference(1.0, NAN, NAN, 0.06)) == "inconclusive"
    assert verdict(Difference(1.0, NAN, NAN, NAN)) == ""
    assert verdict(Difference(1.0, NAN, NAN, NAN), floor=2.0) == "cannot measure"


def test_margins_are_read():
    margins = Margins.parse(" nll=0.02 ,1%")
    assert margins.of("nll", 5.0) == 0.02 and margins.of("rouge_l (beam)", -2.0) == 0.02
    assert Margins.parse("rouge_l=0.5").of("rouge_l (beam)", 1.0) == 0.5
    assert Margins.parse("rouge_l=0.5").of("nll", 1.0) is None
    assert Margins.parse(None).of("nll", 1.0) is None
    for text in ("0.1", "nll", "nll=x", "nll=-1", "0%", "nll=1%", "", "nll=inf"):
        with pytest.raises(UserError, match=r"--margin .*: give NAME=NUMBER"):
            Margins.parse(text)


def test_differences_have_verdicts():
    random = np.random.default_rng(0)
    noise = random.normal(size=200)
    references = random.normal(size=(30, 2))
    clouds = [Clouds(references, random.normal(size=(1, 30, 2))) for _ in "ab"]
    first = {"x": mean_of(noise + 10), "m": Replicates(np.array([0.9, 0.92])), "e": clouds[0]}
    other = {"x": mean_of(noise + 10.05), "m": Replicates(np.array([0.91, 0.95])), "e": clouds[1]}
    found = {"a": first, "b": other}
    (pair,) = compare(found, Margins(share=0.01), {"m": 0.05})
    verdicts = {name: one["verdict"] for name, one in pair["measures"].items()}
    assert verdicts["x"] == "seen below the margin" and verdicts["m"] == "cannot measure"
    energy = pair["measures"]["e"]
    assert energy["low"] is None and energy["verdict"] == "inconclusive"
    assert energy["mean"] == pytest.approx(clouds[1].measured().value - clouds[0].measured().value)
    (pair,) = compare(found, Margins(own={"x": 0.01}), {"m": 0.01})
    assert pair["measures"]["x"]["verdict"] == "seen"
    assert pair["measures"]["m"]["verdict"] == "inconclusive"
