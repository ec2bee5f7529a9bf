"""Shared test helpers.

They read what a run logged and what an example trains, check refusals, and load Triton kernels that
run without a GPU.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.data.tokenize import IGNORE_INDEX
from stanford_alpaca.flags import exit_on_user_error

# flags: an evaluation and a checkpoint after each step, and the best of them at the end
BEST_OF_EACH_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def steps(folder: Path) -> list[dict]:
    return [entry for entry in history(folder) if "loss" in entry]


def evaluations(folder: Path) -> list[dict]:
    return [entry for entry in history(folder) if "eval_loss" in entry]


def trained_texts(tokenizer: PreTrainedTokenizerBase, labels: list[int]) -> list[str]:
    """Decodes each contiguous stretch of trained labels."""
    texts: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE_INDEX:
            texts[-1].append(label)
        elif texts[-1]:
            texts.append([])
    return [tokenizer.decode(ids) for ids in texts if ids]


def triton_kernels(interpret: bool = True):
    """Returns a separate copy of the module of Triton kernels.

    Decorating a kernel decides for good whether it is interpreted or compiled.
    """
    path = (
        Path(__file__).parents[1] / "stanford_alpaca" / "losses" / "backends" / "triton_kernels.py"
    )
    spec = importlib.util.spec_from_file_location(f"triton_kernels_{interpret}", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        spec.loader.exec_module(module)
    return module


def refusal(
    capsys, monkeypatch, command: Callable[[], object], *untouched: Path
) -> tuple[int, str]:
    """Returns the exit status and the error line of a command that is refused.

    Fails if the command loaded a model, printed more than one line, or changed one of the folders.
    """

    def load(*args, **kwargs):
        # This is not an Exception, which the command would turn into an error line.
        pytest.fail("a model or a pickle was loaded")

    before = [_tree(folder) for folder in untouched]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
        patch.setattr("torch.load", load)
        capsys.readouterr()
        exit_on_user_error(command)
    printed = capsys.readouterr()
    (line,) = [
        line
        for line in printed.err.splitlines()
        if line and not re.search(r"examples/s|\?it/s|it/s", line)
    ]
    assert line.startswith("error: ") and "Traceback" not in printed.out
    assert [_tree(folder) for folder in untouched] == before
    return end.value.code, line.removeprefix("error: ")


def _tree(folder: Path) -> dict[str, bytes | None] | None:
    if not folder.exists():
        return None
    return {
        str(file): file.read_bytes() if file.is_file() else None
        for file in sorted(folder.rglob("*"))
    }
