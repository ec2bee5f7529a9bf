"""Draws the plots of ``benchmarks.loss``."""

from pathlib import Path
from statistics import median
from typing import Any


def bars(rows: list[dict[str, Any]], file: Path) -> None:
    """Plots seconds and peak extra memory of every contender, two plots per case.

    Seconds are medians, with whiskers from the least to the greatest.
    """
    from matplotlib.figure import Figure

    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        case = row["case"]
        name = (
            f"{case['shape']}: N={case['tokens']} H={case['hidden']} V={case['vocab']} "
            f"{case['dtype']}"
        )
        if "seconds" in row:
            cases.setdefault(name, []).append(row)
    figure = Figure(figsize=(12, 4 * len(cases)), layout="constrained")
    for (left, right), (name, ran) in zip(
        figure.subplots(len(cases), 2, squeeze=False), cases.items(), strict=True
    ):
        for index, environment in enumerate(ran[0]["seconds"]):
            values = [row["seconds"][environment] for row in ran]
            middle = [median(seconds) for seconds in values]
            whiskers = [
                [m - min(s) for m, s in zip(middle, values, strict=True)],
                [max(s) - m for m, s in zip(middle, values, strict=True)],
            ]
            places = [place + 0.4 * index for place in range(len(ran))]
            left.barh(places, middle, 0.4, xerr=whiskers, label=environment)
        left.set_yticks(range(len(ran)), [row["contender"] for row in ran])
        right.barh(
            [row["contender"] for row in ran], [row.get("peak_extra_mib", 0) for row in ran], 0.6
        )
        left.set(title=name, xlabel="seconds, forward and backward")
        right.set(xlabel="peak extra memory, MiB")
        left.legend()
        for axes in (left, right):
            axes.invert_yaxis()
    figure.savefig(file)


def curves(rows: list[dict[str, Any]], file: Path) -> None:
    """Plots the time per token and vocabulary entry of every contender.

    One plot varies the tokens, the other the vocabulary.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (shape, entry) in zip(
        figure.subplots(1, 2), (("tokens", "tokens"), ("vocabulary", "vocab")), strict=True
    ):
        ran = [
            row
            for row in rows
            if row["case"]["shape"] == shape and "seconds" in row and row["contender"] != "floor"
        ]
        for name in dict.fromkeys(row["contender"] for row in ran):
            points = sorted(
                (row["case"][entry], cost(row)) for row in ran if row["contender"] == name
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        if ran:
            fixed = "vocab" if entry == "tokens" else "tokens"
            axes.set(
                title=f"H={ran[0]['case']['hidden']}, {fixed} {ran[0]['case'][fixed]}", xlabel=entry
            )
            axes.legend()
        axes.set(ylabel="ns per token and vocabulary entry", ylim=(0, None))
    figure.savefig(file)


def cost(row: dict[str, Any]) -> float:
    """Returns nanoseconds in the last environment, which is the launcher's on a CPU."""
    return (
        1e9
        * median(list(row["seconds"].values())[-1])
        / row["case"]["tokens"]
        / row["case"]["vocab"]
    )
