"""What a run prints while it trains: a line for each log entry, in columns, and a bar.

The bar is there in a terminal only. The same entries go to OUTPUT_DIR/log.jsonl, one JSON object a
line, for programs. Whatever happens to a terminal or a disk never ends a training: the lines are
lost, the run goes on.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from stanford_alpaca.checkpoint.files import append_lines
from stanford_alpaca.console import printable, say

LOG_FILE = "log.jsonl"
LOG_COLUMNS = {  # entry -> heading, width, format
    "step": ("step", 7, "d"),
    "epoch": ("epoch", 7, ".3g"),
    "loss": ("loss", 9, ".4g"),
    "nll": ("nll", 9, ".4g"),
    "emo": ("emo", 9, ".4g"),
    "target_prob": ("p(target)", 10, ".3f"),
    "grad_norm": ("grad", 8, ".3g"),
    "learning_rate": ("rate", 10, ".3g"),
    "examples": ("examples", 9, ".4g"),
    "supervised_tokens_per_s": ("tokens/s", 10, ",.0f"),
    "mfu": ("mfu", 6, ".1%"),
    "skipped_steps": ("skipped", 8, "d"),
    "loss_spikes": ("spikes", 7, "d"),
}
AGAIN = 25  # rows after which the headings are repeated
ESTIMATED_FROM = 3  # steps: the first ones are slower


class Progress(TrainerCallback):
    """Prints and writes the log of a run, in place of transformers' callbacks."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._names: list[str] = []  # of the present columns
        self._rows = 0  # since the headings
        self._bar: Any = None
        self._lost = False  # whether a line of the file could not be written
        self._began = (0.0, 0)  # seconds and step, for the estimate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._drop_later(Path(str(args.output_dir)) / LOG_FILE, state.global_step)
        self._began = (time.perf_counter(), state.global_step)
        if self._mode == "emo":
            say("mode emo: the loss has the value of nll, by construction; its gradient differs")
        if not args.disable_tqdm and sys.stderr.isatty():
            done = state.global_step
            self._bar = tqdm(total=state.max_steps, initial=done, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        seconds, first = self._began
        if state.is_world_process_zero and state.global_step - first == 1:
            self._began = (time.perf_counter(), state.global_step)  # without the first step
        elif state.is_world_process_zero and state.global_step - first == ESTIMATED_FROM:
            each = (time.perf_counter() - seconds) / ESTIMATED_FROM
            left = each * (state.max_steps - state.global_step)
            self._say(f"{each:.3g} s a step; about {in_words(left)} for the rest")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, **logs}
        entry.pop("total_flos", None)
        self._write(Path(str(args.output_dir)) / LOG_FILE, entry)
        if "loss" in entry:
            self._row(entry)
        else:
            prefix = "eval_" if any(name.startswith("eval_") for name in entry) else "train_"
            numbers = {
                name.removeprefix(prefix).replace("_", " "): value
                for name, value in entry.items()
                if name.startswith(prefix) and isinstance(value, int | float)
            }
            said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            what = {"eval_": "evaluation", "train_": "trained"}[prefix]
            self._say(f"{what} at step {state.global_step}: {said}")
            self._rows = AGAIN  # headings again

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _row(self, entry: Mapping[str, Any]) -> None:
        present = {*entry, *self._names, "supervised_tokens_per_s"}  # which the first step lacks
        names = [name for name in LOG_COLUMNS if name in present]
        if names != self._names or self._rows >= AGAIN:
            self._names, self._rows = names, 0
            self._say(" ".join(f"{LOG_COLUMNS[name][0]:>{LOG_COLUMNS[name][1]}}" for name in names))
        self._rows += 1
        self._say(" ".join(_cell(entry.get(name, "-"), *LOG_COLUMNS[name][1:]) for name in names))

    def _say(self, line: str) -> None:
        if self._bar is None:
            say(line)
        else:
            self._bar.write(printable(line))

    def _write(self, file: Path, entry: Mapping[str, Any]) -> None:
        try:
            append_lines(file, json.dumps(entry) + "\n")
        except OSError as error:
            if not self._lost:
                self._say(f"{file}: cannot be written to ({error.strerror}); the run goes on")
            self._lost = True

    def _drop_later(self, file: Path, step: int) -> None:
        """Takes out what an interrupted run logged after the step that this one starts from."""
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        except OSError:
            pass  # the next entry says so


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return float("inf")


def _cell(value: Any, width: int, form: str) -> str:
    try:
        return f"{int(value) if form == 'd' else value:{width}{form}}"
    except (ValueError, TypeError):
        return f"{value!s:>{width}}"


def in_words(seconds: float) -> str:
    """Returns a duration as one would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
