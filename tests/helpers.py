"""What a finished run logged, and Triton kernels that run without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def steps(folder: Path) -> list[dict]:
    return [entry for entry in history(folder) if "loss" in entry]


def evaluations(folder: Path) -> list[dict]:
    return [entry for entry in history(folder) if "eval_loss" in entry]


def triton_kernels(interpret: bool = True):
    """A copy of the module of its own: a kernel is interpreted or compiled for good as soon as it is decorated."""
    path = Path(__file__).parents[1] / "stanford_alpaca" / "token_stats" / "triton_kernels.py"
    spec = importlib.util.spec_from_file_location(f"triton_kernels_{interpret}", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        spec.loader.exec_module(module)
    return module
