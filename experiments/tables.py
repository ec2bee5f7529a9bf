"""Tables and plots of what experiments measured.

A run is what ``stanford_alpaca/bench/tables.py`` says.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stanford_alpaca.bench.tables import Run, differences_of, each, means_of, shown, values_of

RESULTS = Path(__file__).resolve().parent / "results"


def keep(name: str, about: dict[str, Any], runs: list[Run], tables: str) -> None:
    """Writes results/NAME.json and results/NAME.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(tables + "\n")


def means(runs: list[Run]) -> str:
    """Returns the table of ``means_of`` for each setting."""
    return _pages(runs, means_of)


def differences(runs: list[Run], base: str = "mle") -> str:
    """Returns the table of ``differences_of`` for each setting."""
    return _pages(runs, lambda here: differences_of(here, base))


def _pages(runs: list[Run], table: Callable[[list[Run]], list[list[str]]]) -> str:
    pages = []
    for setting in each(runs, "setting"):
        head, *rows = table([run for run in runs if run["setting"] == setting])
        pages.append(f"**{setting}**\n\n{markdown(head, rows)}")
    return "\n\n".join(pages)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def plot(runs: list[Run], names: list[str], label: str, file: Path) -> None:
    """Plots a panel per measure, with a line per arm.

    A line shows the mean and standard deviation at every setting. An arm with a single value gets a
    grey line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6 * -(-len(names) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 3), 3, squeeze=False).ravel()
    settings, lines = each(runs, "setting"), (":", "--", "-.")
    for panel, name in zip(panels, names, strict=False):
        for number, arm in enumerate(each(runs, "arm")):
            found = [
                values_of([run for run in runs if run["setting"] == setting], arm, name)
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
        panel.set(title=shown(name), xlabel=label, xlim=(-0.4, len(settings) - 0.6))
    for panel in panels[len(names) :]:
        panel.axis("off")
    panels[0].legend()
    figure.savefig(file, dpi=110)
