"""What a finished run logged."""

import json
from pathlib import Path


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def steps(folder: Path) -> list[dict]:
    return [entry for entry in history(folder) if "loss" in entry]


def evaluations(folder: Path) -> list[dict]:
    return [entry for entry in history(folder) if "eval_loss" in entry]
