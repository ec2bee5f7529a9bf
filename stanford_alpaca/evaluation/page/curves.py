"""What training left in a run's folder: its curves and the flags that tell runs apart."""

import math
from pathlib import Path
from typing import Any

from stanford_alpaca.checkpoint.bounded import read_json, read_yaml
from stanford_alpaca.checkpoint.manifest import checkpoints
from stanford_alpaca.errors import UserError, first_line

STATE, FLAGS = "trainer_state.json", "run.yaml"
CURVES = ("loss", "nll", "emo", "learning_rate", "eval_loss", "eval_nll", "eval_emo")
POINTS = 600  # the most points of a curve; longer ones show means of several log entries
TOLD = ("mode", "loss", "model_name_or_path", "learning_rate", "global_batch")
# shown only if runs differ in them
TOLD_APART = (
    "data_path",
    "cost",
    "cost_kind",
    "cost_seed",
    "emo_weighting",
    "emo_weight",
    "lora",
    "seed",
)

Points = list[list[float]]  # [step, value]


def curves_of(run: str) -> dict[str, Points] | None:
    """Returns the curves that the run logged, or None if there is no log.

    Curves without a point are left out. For a run that has not ended, they come from its newest
    checkpoint.
    """
    folder = Path(run).expanduser()
    file = next(
        (place / STATE for place in [folder, *checkpoints(folder)] if (place / STATE).is_file()),
        None,
    )
    if file is None:
        return None
    try:
        history = read_json(file)["log_history"]
        found = {
            name: [[entry["step"], entry[name]] for entry in history if name in entry]
            for name in CURVES
        }
        drawn = {
            name: thinned([point for point in points if math.isfinite(point[1])])
            for name, points in found.items()
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file}: no training log ({first_line(error)}); remove it, or train again"
        ) from None
    # In mode emo the loss has the value of nll: one curve is enough.
    same = ("loss", "eval_loss") if recorded_flags(run).get("mode") == "emo" else ()
    twice = {name for name in same if drawn[name.replace("loss", "nll")]}
    return {name: points for name, points in drawn.items() if points and name not in twice}


def thinned(points: Points, most: int = POINTS) -> Points:
    """Returns at most ``most`` points.

    Each is the mean of equally many neighbours, at the step of the last of them.
    """
    size = -(-len(points) // most)
    parts = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [[part[-1][0], sum(value for _, value in part) / len(part)] for part in parts]


def recorded_flags(run: str) -> dict[str, Any]:
    """Returns the flags in the run's run.yaml.

    They are empty if training did not write the folder.
    """
    file = Path(run).expanduser() / FLAGS
    if not file.is_file():
        return {}
    try:
        flags = read_yaml(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); remove it") from None
    return flags if isinstance(flags, dict) else {}


def shown_flags(flags: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for each run the flags that the page shows."""
    trained = [run for run in flags if run]
    apart = [name for name in TOLD_APART if len({str(run.get(name)) for run in trained}) > 1]
    return [
        {name: run[name] for name in (*TOLD, *apart) if run.get(name) is not None} for run in flags
    ]
