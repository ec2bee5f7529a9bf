"""Formats measures for the terminal."""

from pathlib import Path
from typing import Any

from stanford_alpaca.console import align
from stanford_alpaca.evaluation.intervals import FEWEST

# the measures that are shown for several pairs
FEW = (
    "nll", "emo", "entropy", "token_accuracy", "ece", "costly_mass", "exact_match", "rouge_l",
    "mauve", "energy_distance",
)  # fmt: skip
TOO_FEW = f"no intervals: they need at least {FEWEST} records that a measure applies to"


def format_results(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Formats values with their 95 % intervals: measures down, models across."""
    measures = list(dict.fromkeys(measure for column in results.values() for measure in column))
    columns = [
        [name, *_cells([column.get(measure) for measure in measures])]
        for name, column in results.items()
    ]
    rows = ["", *(measure.replace("_", " ") for measure in measures)]
    return align([list(row) for row in zip(rows, *columns, strict=True)])


def format_differences(differences: list[dict[str, Any]]) -> str:
    """Formats a table per pair of models.

    Of three models or fewer every pair is shown, of more each model against the first. Measures
    without p and verdict are left out, such as those of the whole set with one seed. With several
    pairs only the measures in ``FEW`` are shown.
    """
    first = differences[0]["minus"] if differences else ""
    shown = (
        differences
        if len(differences) <= 3
        else [pair for pair in differences if pair["minus"] == first]
    )
    tables = []
    for pair in shown:
        table = [["", "difference", "95 % interval", "p", "verdict"]]
        for measure, found in pair["measures"].items():
            told = found["p"] is not None or found.get("verdict")
            if told and (len(shown) == 1 or measure.partition(" (")[0] in FEW):
                ends = [found[name] for name in ("low", "high") if found[name] is not None]
                interval = " to ".join(_number(end, "+") for end in ends)
                p = "" if found["p"] is None else f"{found['p']:.4f}"
                cells = [_number(found["mean"], "+"), interval, p, found.get("verdict", "")]
                table.append([measure.replace("_", " "), *cells])
        rows = align(table) if len(table) > 1 else TOO_FEW
        tables.append(f"{pair['model']} minus {pair['minus']}:\n{rows}")
    return "\n\n".join(tables)


def _cells(column: list[dict[str, Any] | None]) -> list[str]:
    """Returns values with their intervals, aligned below each other."""
    values = [
        "-" if row is None or row["value"] is None else _number(row["value"]) for row in column
    ]
    intervals = [
        f" [{_short(row['low'])}, {_short(row['high'])}]"
        if row is not None and row["low"] is not None
        else ""
        for row in column
    ]
    width = max(map(len, intervals), default=0)
    return [
        value + interval.ljust(width) for value, interval in zip(values, intervals, strict=True)
    ]


def _number(value: float, sign: str = "-") -> str:
    return (
        f"{value:{sign},.0f}"
        if isinstance(value, int) or abs(value) >= 100
        else f"{value:{sign}.4f}"
    )


def _short(value: float) -> str:
    """Formats a number with three digits.

    Thousands get no separators, because a comma stands between the two ends of an interval.
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short_names(paths: list[str]) -> list[str]:
    """Returns the end of each path, with as few parts as tell all of them apart."""
    parts = [Path(path).parts or (path,) for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-count:])) for part in parts]
        if len(set(names)) == len(paths):
            return names
    return paths
