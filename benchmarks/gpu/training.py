"""Trains the shipped model in every form on the GPU, and compares losses with those of a CPU.

The runs are short and stand side by side. ``results/gpu-expected.json`` has a CPU's losses, in
float32 and in bfloat16; ``python -m benchmarks.gpu --expected`` writes it. A loss may be off by
twice the greatest difference of these two, and by 0.02.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.figures import ROOT, Figures, Setting, main

EXPECTED = ROOT / "benchmarks" / "results" / "gpu-expected.json"
COMPARED = 8  # steps with a CPU's losses
STEPS, TOY_STEPS = 40, 3
SHARE, SLACK = 2, 0.02
POLL = 0.05
FLAGS = {
    "data_path": ROOT / "data" / "instructions" / "train.json",
    "per_device_train_batch_size": 8,
    "global_batch": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "preprocessing_num_workers": 1,
}
FORMS: dict[str, dict[str, Any]] = {  # forms that have losses of their own
    "plain": {},
    "lora": {"lora": True},
    "packing": {"packing": True, "attn_implementation": "sdpa"},
}
MODEL = ROOT / "data" / "tiny-base"
TRAIN = (sys.executable, "-m", "stanford_alpaca.train")
LAUNCH = (sys.executable, "-m", "stanford_alpaca.launch", "--standalone", "--nproc_per_node", "1")


class Run:
    """One training command, started at once, that ends with the block."""

    def __init__(self, folder: Path, name: str, start: tuple[str, ...], **flags: Any):
        self.out, self.output = folder / name, folder / f"{name}.txt"
        named = FLAGS | {"save_strategy": "no", "cache_dir": folder / f"{name}-cache"} | flags
        words = [text for flag, value in named.items() for text in (f"--{flag}", str(value))]
        self.command = [*start, *words]
        self.process = self.started()

    def started(self) -> subprocess.Popen:
        environment = os.environ | {"REPORT": "no", "OUTPUT_DIR": str(self.out), "NPROC": "1"}
        environment["PYTHON"] = sys.executable
        with self.output.open("a") as output:
            return subprocess.Popen(
                [str(word) for word in self.command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def ended(self, *wanted: int) -> None:
        """Waits. Raises RuntimeError with the last lines if the status is not a wanted one."""
        status = self.process.wait()
        if status not in wanted:
            tail = self.output.read_text(errors="replace")[-3000:]
            print(" ".join(map(str, self.command)), tail, sep="\n", flush=True)
            raise RuntimeError(f"status {status}: {tail.strip().splitlines()[-1:]}")

    def losses(self) -> list[float]:
        rows = json.loads((self.out / "trainer_state.json").read_text())["log_history"]
        return [row["loss"] for row in rows if "loss" in row]

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)


def trained(folder: Path, name: str, steps: int, **flags: Any) -> Run:
    where = {"model_name_or_path": MODEL, "mode": "emo", "output_dir": folder / name}
    return Run(folder, name, TRAIN, **where, max_steps=steps, **flags)


def run(setting: Setting, figures: Figures) -> None:
    """Starts all runs, and judges each when it has ended."""
    expected = json.loads(EXPECTED.read_text())["losses"]
    most = TOY_STEPS if setting.toy else STEPS
    few = min(most, COMPARED)
    with TemporaryDirectory() as name:
        folder, form = Path(name), {"bf16": True}
        where = {"output_dir": folder / "fsdp", "model_name_or_path": MODEL, "mode": "emo"}
        runs = {  # (run, the form whose losses it has to have)
            "plain": (trained(folder, "plain", most, **form), "plain"),
            "stopped": (trained(folder, "stopped", most, **form), None),
            "train_emo.sh": (
                Run(
                    folder,
                    "script",
                    ("bash", str(ROOT / "train_emo.sh"), str(MODEL), "emo"),
                    **{"max_steps": few, "num_train_epochs": 1} | form,
                ),
                "plain",
            ),
            "FSDP2, one rank": (
                Run(
                    folder,
                    "fsdp",
                    (*LAUNCH, "-m", "stanford_alpaca.train"),
                    **where | {"engine": "fsdp", "max_steps": few} | form,
                ),
                "plain",
            ),
        }
        runs |= {
            each: (trained(folder, each, few, **form | FORMS[each]), each)
            for each in ("lora", "packing")
        }
        try:
            judge(runs, expected, figures)
        finally:
            for each, _ in runs.values():
                each.stop()
            for each, _ in runs.values():
                each.process.wait()


def judge(runs: dict[str, tuple[Run, str | None]], expected: Any, figures: Figures) -> None:
    stopped, plain = runs["stopped"][0], runs["plain"][0]
    figures.attempt("stopped by SIGTERM", lambda: interrupt(stopped, figures))
    for what, (each, form) in runs.items():
        if form is not None:

            def compare(each: Run = each, what: str = what, form: str = form) -> None:
                each.ended(0)
                compared(what, each.losses(), expected[form], figures)

            figures.attempt(f"losses, {what}", compare)
    figures.attempt("resumed", lambda: resumed(stopped, plain, figures))
    figures.attempt("generate", lambda: generated(plain.out, figures))


def interrupt(run: Run, figures: Figures) -> None:
    """Sends SIGTERM after the first step, and starts the same command again."""
    log = run.out / "log.jsonl"
    while run.process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(POLL)
    run.stop()
    run.ended(75)
    figures.add("stopped by SIGTERM", 75, "status", ok=True)
    run.command += ["--resume", "auto"]
    run.process = run.started()


def resumed(run: Run, plain: Run, figures: Figures) -> None:
    run.ended(0)
    mine, whole = run.losses(), plain.losses()
    off = max(abs(a - b) for a, b in zip(mine, whole, strict=True))
    same = f"{sum(a == b for a, b in zip(mine, whole, strict=True))} of {len(whole)} steps equal"
    figures.add("resumed, greatest difference of losses", off, "nats", same, ok=off < SLACK)


def compared(what: str, losses: list[float], known: dict[str, list[float]], figures: Any) -> None:
    """Adds how far losses are from a CPU's in float32, over what is allowed."""
    steps = min(len(losses), COMPARED)
    exact, rounded = known["float32"], known["bfloat16"]
    allowed = SLACK + SHARE * max(abs(a - b) for a, b in zip(exact, rounded, strict=True))
    off = max(abs(a - b) for a, b in zip(losses[:steps], exact[:steps], strict=True))
    note = f"over {steps} steps, {allowed:.3f} allowed, last {losses[steps - 1]:.4f}"
    figures.add(f"losses, {what}", off, "nats off", note, ok=off <= allowed, raw=losses)


def generated(model: Path, figures: Figures) -> None:
    out = model.parent / "samples.jsonl"
    command = [sys.executable, "-m", "stanford_alpaca.generate", str(model), "--out", str(out)]
    command += ["--instruction", "Name a colour.", "--max_new_tokens", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    (text,) = json.loads(out.read_text())["responses"].values()
    figures.add("generate", repr(text), ok=bool(text.strip()))


def expect() -> None:
    """Writes a CPU's losses of every form."""
    import torch
    import transformers

    losses: dict[str, dict[str, list[float]]] = {}
    with TemporaryDirectory() as name:
        for form, flags in FORMS.items():
            for dtype in ("float32", "bfloat16"):
                run = trained(
                    Path(name), f"{form}-{dtype}", COMPARED, bf16=dtype == "bfloat16", **flags
                )
                run.ended(0)
                losses.setdefault(form, {})[dtype] = run.losses()
    made = {"torch": torch.__version__, "transformers": transformers.__version__}
    EXPECTED.write_text(json.dumps({"made_with": made, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    called: Callable[[], None] = expect if sys.argv[1:] == ["--expected"] else lambda: main(run)
    called()
