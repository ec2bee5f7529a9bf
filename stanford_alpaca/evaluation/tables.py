"""What was measured, for the terminal."""

from typing import Any

FEW = (
    "nll",
    "emo",
    "token_accuracy",
    "ece",
    "costly_mass",
    "exact_match",
    "rouge_l",
    "mauve",
)  # where there are many pairs
Row = dict[str, Any]


def format_results(results: dict[str, dict[str, Row]]) -> str:
    """Measures down, models across: values with their 95 % intervals."""
    measures = list(dict.fromkeys(measure for column in results.values() for measure in column))
    columns = [
        [name, *_cells([column.get(measure) for measure in measures])]
        for name, column in results.items()
    ]
    rows = ["", *(measure.replace("_", " ") for measure in measures)]
    return align([list(row) for row in zip(rows, *columns, strict=True)])


def format_differences(differences: list[Row]) -> str:
    """A table per pair of models: of three models or fewer every pair, of more each against the first.

    What has no p, a measure of the whole set with one seed, is left out; with several pairs, so is all but ``FEW``.
    """
    first = differences[0]["minus"] if differences else ""
    shown = (
        differences
        if len(differences) <= 3
        else [pair for pair in differences if pair["minus"] == first]
    )
    tables = []
    for pair in shown:
        table = [["", "difference", "95 % interval", "p"]]
        for measure, found in pair["measures"].items():
            if found["p"] is not None and (len(shown) == 1 or measure.partition(" (")[0] in FEW):
                mean, low, high = (_number(found[name], "+") for name in ("mean", "low", "high"))
                table.append(
                    [measure.replace("_", " "), mean, f"{low} to {high}", f"{found['p']:.4f}"]
                )
        tables.append(f"{pair['model']} minus {pair['minus']}:\n{align(table)}")
    return "\n\n".join(tables)


def align(table: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(first),
                *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True)),
            ]
        ).rstrip()
        for row in table
    )


def _cells(column: list[Row | None]) -> list[str]:
    """Values, and their intervals below each other."""
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
    """Three digits; none for thousands, as commas stand between the two ends."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
