"""What differences between arms show, over three seeds: rules in the README beside this file.

``found`` has for each arm and measure a value a seed: Items, or a float for a whole set of texts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.tables import markdown
from stanford_alpaca.evaluation.comparison import SIGNIFICANT
from stanford_alpaca.evaluation.intervals import Difference, Items

Values = Sequence[Items] | Sequence[float]  # one a seed
Found = Mapping[str, Mapping[str, Values]]
LEAST = 3  # seeds that a verdict needs
NORMAL = stats.norm.ppf(0.975)
LEAST_P = 0.001  # smaller ones are not to be trusted with few seeds


def mean_over(each: Sequence[Items]) -> Items:
    """Returns the mean of measures of the same test items."""

    def of(sums: np.ndarray) -> np.ndarray:
        parts = np.split(sums, len(each), axis=-1)
        return np.mean([one.of(part) for one, part in zip(each, parts, strict=True)], axis=0)

    return Items(np.concatenate([one.sums for one in each], 1), of)


def mean(values: Values) -> float:
    """Returns the mean over the seeds."""
    return float(np.mean([_value(one) for one in values]))


def difference(ours: Values, theirs: Values) -> Difference:
    """Returns ours minus theirs, paired by seed, of the seeds that both have.

    The variance over items, of a bootstrap of the mean over seeds, and that over seeds, on the same
    items, add up. With fewer than LEAST seeds there is no interval and no p.
    """
    ours, theirs = (each[: min(len(ours), len(theirs))] for each in (ours, theirs))
    gains = np.array([_value(a) - _value(b) for a, b in zip(ours, theirs, strict=True)])
    gain, count = float(gains.mean()), len(gains)
    if count < LEAST:
        return Difference(gain, np.nan, np.nan, np.nan)
    seeds, items = float(gains.var(ddof=1)) / count, 0.0
    if isinstance(ours[0], Items):
        items = (half_width(ours, theirs) / NORMAL) ** 2
    error = np.sqrt(seeds + items)
    if not error > 0:  # equal values do not show how they would vary
        return Difference(gain, np.nan, np.nan, np.nan)
    # Welch and Satterthwaite: the variance over items has many degrees of freedom
    freedom = (count - 1) * ((seeds + items) / seeds) ** 2 if seeds else np.inf
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = float(2 * stats.t.sf(abs(gain) / error, freedom))
    return Difference(gain, gain - half, gain + half, p)


def half_width(ours: Values, theirs: Values) -> float:
    """Returns half of the interval over items, of the difference of the means over seeds."""
    one = mean_over(ours).minus(mean_over(theirs))  # type: ignore[arg-type]
    return (one.high - one.low) / 2


def holm(p: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979)."""
    order = np.argsort(p)
    scaled = np.array(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected.tolist()


def judge(found: Sequence[Difference], margin: float) -> str:
    """Returns the verdict on an arm minus ``mle``, and minus its identity control if it has one."""
    if any(np.isnan(one.p) for one in found):
        return ""
    clear = all(one.p < SIGNIFICANT for one in found) and abs(
        sum(np.sign(one.mean) for one in found)
    ) == len(found)
    within = all(-margin < one.low and one.high < margin for one in found)
    if clear:
        return "seen, below the margin" if within else "seen"
    return "not seen" if within else "inconclusive"


def compare(
    found: Found,
    controls: Mapping[str, Sequence[str]],  # of an arm
    margins: Mapping[str, float],  # of all measures
    primary: str | None = None,  # a measure that is not corrected
) -> list[dict[str, Any]]:
    """Returns a row for each measure of an arm: its value, its differences and the verdict."""
    differences = {
        (measure, arm, control): difference(found[arm][measure], found[control][measure])
        for measure in margins
        for arm in found
        for control in controls.get(arm, ())
        if measure in found[arm]
    }
    known = [k for k, one in differences.items() if k[0] != primary and not np.isnan(one.p)]
    for key, p in zip(known, holm([differences[k].p for k in known]), strict=True):
        differences[key] = differences[key]._replace(p=p)
    rows = []
    for measure in margins:
        for arm, values in found.items():
            if measure not in values:
                continue
            minus = {of: differences[measure, arm, of] for of in controls.get(arm, ())}
            rows.append(
                {
                    "measure": measure,
                    "arm": arm,
                    "seeds": len(values[measure]),
                    "value": mean(values[measure]),
                    "minus": {of: plain(one) for of, one in minus.items()},
                    "verdict": judge([*minus.values()], margins[measure]) if minus else "",
                }
            )
    return rows


def afterwards(
    found: Found, pairs: Sequence[tuple[str, str]], measures: Sequence[str]
) -> dict[str, dict[str, list[float | None]]]:
    """Returns value, ends of the interval and p of differences that no rule asked for.

    They are corrected for nothing, and have no verdict.
    """
    return {
        f"{arm} - {other}": {
            name: plain(difference(found[arm][name], found[other][name])) for name in measures
        }
        for arm, other in pairs
        if {arm, other} <= found.keys()
    }


def table_afterwards(found: Mapping[str, Mapping[str, list[float | None]]]) -> str:
    """Returns a table of what ``afterwards`` has found."""
    measures = list(next(iter(found.values()), {}))
    head = ["afterwards, without verdict", *(name.replace("_", " ") for name in measures)]
    rows = [[name, *(shown(of[measure]) for measure in measures)] for name, of in found.items()]
    return markdown(head, rows)


def table(rows: Sequence[dict[str, Any]], margins: Mapping[str, float]) -> str:
    """Returns a table a measure, with a row an arm."""
    pages = []
    for measure, margin in margins.items():
        cells = [
            [
                row["arm"],
                str(row["seeds"]),
                f"{row['value']:.4f}",
                *([shown(one) for one in row["minus"].values()] + ["", ""])[:2],
                row["verdict"],
            ]
            for row in rows
            if row["measure"] == measure
        ]
        head = ["arm", "seeds", "value", "minus `mle`", "minus the identity control", "verdict"]
        pages.append(
            f"**{measure.replace('_', ' ')}**, margin {margin:g}\n\n{markdown(head, cells)}"
        )
    return "\n\n".join(pages)


def plot(rows: Sequence[dict[str, Any]], margins: Mapping[str, float], file: Path) -> None:
    """Draws each arm minus ``mle``, a panel a measure, with the margin as a band."""
    from matplotlib.figure import Figure

    high = -(-len(margins) // 2)
    figure = Figure(figsize=(11, 3.4 * high), layout="constrained")
    panels = figure.subplots(high, 2, squeeze=False).ravel()
    for panel, (measure, margin) in zip(panels, margins.items(), strict=False):
        shown = [row for row in rows if row["measure"] == measure and row["minus"]]
        for place, row in enumerate(shown):
            value, low, top, _ = next(iter(row["minus"].values()))
            error = None if low is None else [[value - low], [top - value]]
            panel.errorbar(value, place, xerr=error, fmt="o", color="C0" if error else "grey")
        panel.axvspan(-margin, margin, color="grey", alpha=0.2)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set(title=f"{measure.replace('_', ' ')}, minus mle")
        panel.locator_params(axis="x", nbins=5)
        panel.set_yticks(range(len(shown)), [row["arm"] for row in shown])
        panel.invert_yaxis()
    for panel in panels[len(margins) :]:
        panel.axis("off")
    figure.savefig(file, dpi=110)


def planned(halves: Mapping[str, Mapping[str, float]], margins: Mapping[str, float]) -> str:
    """Returns each margin beside the expected half-widths; a ! marks those that exceed it."""
    rows = [
        [name, f"{margin:g}"]
        + [f"{of[name]:.2g}{'!' if of[name] > margin else ''}" for of in halves.values()]
        for name, margin in margins.items()
    ]
    return markdown(["measure", "margin", *halves], rows)


def plain(one: Difference) -> list[float | None]:
    """Returns value, ends of the interval and p, to five digits; None for what is unknown."""
    return [None if np.isnan(value) else float(f"{value:.5g}") for value in one]


def shown(one: Sequence[float | None]) -> str:
    """Returns a difference for a table."""
    value, low, high, p = one
    if low is None or p is None:
        return f"{value:+.4f}"
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}], p {f'{p:.2g}' if p >= LEAST_P else '< .001'}"


def _value(one: Items | float) -> float:
    return one.value if isinstance(one, Items) else one
