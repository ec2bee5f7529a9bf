"""Tables and plots of what experiments measured.

A run is a dict with setting, arm, seed, and measures {name: value}.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from stanford_alpaca.evaluation.intervals import Replicates

RESULTS = Path(__file__).resolve().parent / "results"
Run = dict[str, Any]


def keep(name: str, about: dict[str, Any], runs: list[Run], tables: str) -> None:
    """Writes results/NAME.json and results/NAME.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(tables + "\n")


def means(runs: list[Run]) -> str:
    """Returns a table per setting, with a row per arm and a column per measure.

    Cells are means and standard deviations over the seeds.
    """
    pages = []
    for setting in _each(runs, "setting"):
        here = [run for run in runs if run["setting"] == setting]
        names = list(dict.fromkeys(name for run in here for name in run["measures"]))
        rows = [
            [arm, *(_spread(_values(here, arm, name)) for name in names)]
            for arm in _each(here, "arm")
        ]
        pages.append(f"**{setting}**\n\n{markdown(['', *map(_shown, names)], rows)}")
    return "\n\n".join(pages)


def differences(runs: list[Run], base: str = "mle") -> str:
    """Returns the same tables of each arm minus the base, paired by seed.

    Each difference has Student's 95 % interval, with a * if the interval excludes 0.
    """
    pages = []
    for setting in _each(runs, "setting"):
        here = [run for run in runs if run["setting"] == setting]
        names = [name for name in here[-1]["measures"] if len(_values(here, base, name)) > 1]
        rows = []
        for arm in _each(here, "arm"):
            if arm != base and len(_values(here, arm, names[0])) > 1:
                rows.append([f"{arm} - {base}", *(_gain(here, arm, base, name) for name in names)])
        pages.append(f"**{setting}**\n\n{markdown(['', *map(_shown, names)], rows)}")
    return "\n\n".join(pages)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def bold(nlls: dict[float, float]) -> list[str]:
    """Returns nll by learning rate as text, the least in bold.

    A ! marks the least if it belongs to the lowest or highest rate.
    """
    best = min(nlls, key=nlls.__getitem__)
    edge = "!" if best in (min(nlls), max(nlls)) else ""
    return [
        f"**{rate:g}: {nll:.4f}{edge}**" if rate == best else f"{rate:g}: {nll:.4f}"
        for rate, nll in nlls.items()
    ]


def plot(runs: list[Run], names: list[str], label: str, file: Path) -> None:
    """Plots a panel per measure, with a line per arm.

    A line shows the mean and standard deviation at every setting. An arm with a single value gets a
    grey line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6 * -(-len(names) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 3), 3, squeeze=False).ravel()
    settings, lines = _each(runs, "setting"), (":", "--", "-.")
    for panel, name in zip(panels, names, strict=False):
        for number, arm in enumerate(_each(runs, "arm")):
            found = [
                _values([run for run in runs if run["setting"] == setting], arm, name)
                for setting in settings
            ]
            if all(len(values) == 1 for values in found):
                panel.axhline(found[0][0], linestyle=lines[number % 3], color="grey", label=arm)
            elif all(found):
                places = np.arange(len(settings)) + 0.05 * (number - 2)
                spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found]
                panel.errorbar(
                    places,
                    [statistics.mean(v) for v in found],
                    spread,
                    marker="o",
                    capsize=3,
                    label=arm,
                )
        panel.set_xticks(range(len(settings)), settings)
        panel.set(title=_shown(name), xlabel=label, xlim=(-0.4, len(settings) - 0.6))
    for panel in panels[len(names) :]:
        panel.axis("off")
    panels[0].legend()
    figure.savefig(file, dpi=110)


def _each(runs: list[Run], key: str) -> list[str]:
    return list(dict.fromkeys(run[key] for run in runs))


def _values(runs: list[Run], arm: str, name: str) -> list[float]:
    return list(_by_seed(runs, arm, name).values())


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


def _shown(name: str) -> str:
    return name.replace("_", " ")
