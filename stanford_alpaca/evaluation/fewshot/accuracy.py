"""Turns predictions into accuracies over seeds, comparisons of models, and tables of both."""

from typing import Any

import numpy as np

from stanford_alpaca.console import align
from stanford_alpaca.evaluation.intervals import PAIRED_RESAMPLES, mcnemar, paired_bootstrap

MEAN = "mean of tasks"
# of a model: task -> [seeds, items], 1 where the prediction is the label, else 0
Right = dict[str, np.ndarray]


def right_by_task(rows: list[dict[str, Any]]) -> Right:
    """Returns which of a model's predictions are right.

    The rows are in the order of seeds and items.
    """
    found: dict[str, dict[Any, list[bool]]] = {}
    for row in rows:
        found.setdefault(row["task"], {}).setdefault(row["seed"], []).append(
            row["prediction"] == row["label"]
        )
    return {task: np.array(list(seeds.values()), dtype=float) for task, seeds in found.items()}


def accuracies(right: Right) -> dict[str, list[float]]:
    """Returns the accuracy with each seed, for every task and for the mean of tasks."""
    found = {task: values.mean(1) for task, values in right.items()}
    found |= {MEAN: np.mean(list(found.values()), axis=0)} if len(found) > 1 else {}
    return {task: values.tolist() for task, values in found.items()}


def compare_accuracy(first: Right, other: Right) -> dict[str, dict[str, float]]:
    """Returns what the other model gains on the first, for every task and for the mean of tasks.

    Each gain has an interval and a p-value. With a single seed, a task also has the p-value of
    McNemar's test.
    """
    gains = {task: (other[task] - first[task]).mean(0) for task in first}
    sets = {task: [gain] for task, gain in gains.items()} | (
        {MEAN: list(gains.values())} if len(gains) > 1 else {}
    )
    found = {task: paired_bootstrap(values)._asdict() for task, values in sets.items()}
    for task, values in first.items():
        if len(values) == 1:
            found[task]["mcnemar_p"] = mcnemar(values[0] > 0, other[task][0] > 0)
    return found


def accuracy_table(columns: dict[str, dict[str, list[float]]]) -> str:
    """Returns a table of percent right: tasks down, models across.

    With several seeds a cell holds the mean and the standard deviation over them.
    """
    tasks = list(next(iter(columns.values())))
    return align(
        [
            ["", *columns],
            *([task, *(_percent(column[task]) for column in columns.values())] for task in tasks),
        ]
    )


def _percent(values: list[float]) -> str:
    deviation = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{deviation}"


def comparison_table(first: str, other: str, found: dict[str, dict[str, float]]) -> str:
    """Returns what ``compare_accuracy`` found as a table."""
    head = [
        "",
        "difference",
        "95 % interval",
        "p",
        *(["McNemar p"] if any("mcnemar_p" in row for row in found.values()) else []),
    ]
    table = [head]
    for task, row in found.items():
        low, high = 100 * row["low"], 100 * row["high"]
        mcnemar_p = (
            [f"{row['mcnemar_p']:.4f}" if "mcnemar_p" in row else "-"] if len(head) == 5 else []
        )
        table.append(
            [
                task,
                f"{100 * row['mean']:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                f"{row['p']:.4f}",
                *mcnemar_p,
            ]
        )
    return (
        f"{other} against {first}, paired bootstrap over test items, "
        f"{PAIRED_RESAMPLES:,} resamples:\n{align(table)}"
    )
