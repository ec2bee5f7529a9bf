"""Runs of the training command into which faults are injected, and what they leave.

All ranks are forked from a warm process.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.faults.harness import Ended, Setting, check
from tests.faults.hooks import Fault, Hooks, beside
from tests.faults.processes import LIMIT, LOCK, kill, read, wait_for
from tests.ranks import start_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_STEPS = 6, 2

# Models by name. "sure" has no dropout, so that it trains the same on any number of processes.
BASES: dict[str, dict] = {
    "base": {"attention_dropout": 0.1},
    "other-base": {"attention_dropout": 0.1},
    "wide-base": {"attention_dropout": 0.1, "vocab_size": 2080},
    "sure": {},
}


def command(
    argv: list[str], out: str, fault: Fault | None, more: Callable[[Hooks], None] | None
) -> None:
    """Runs the training command as one rank, and exits with its status."""
    from stanford_alpaca import flags, train

    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(
                number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
            )
        # Rank 1 sleeps there so that a launcher hears of rank 0 first. There is no launcher here.
        flags.time.sleep = pause
        hooks = Hooks(fault, Path(out))
        hooks.install()
        if more is not None:
            more(hooks)
        sys.argv = ["train", *argv]
        train.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pause(seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Sleeps like ``time.sleep``, but for at most 0.2 s, in ranks without a launcher."""
    sleep(min(seconds, 0.2))


@dataclass
class World:
    """A folder with models, data and references.

    A reference is a run without a fault. Each reference is made once.
    """

    folder: Path
    made: set[Path] = field(default_factory=set)
    locks: dict[Path, threading.Lock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        shape = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        shape |= {
            "vocab_size": 2048,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
        }
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-base")
        for seed, (name, changes) in enumerate(BASES.items()):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model("llama", **shape | changes)
            )
            model.save_pretrained(self.folder / name)
            tokenizer.save_pretrained(self.folder / name)
        records = json.loads((ROOT / "data" / "instructions" / "train.json").read_text())
        # 36 records need fillers in an epoch, and the last step lies within an epoch.
        (self.folder / "train.json").write_text(json.dumps(records[:36]))
        (self.folder / "held.json").write_text(json.dumps(records[36:45]))

    def argv(self, setting: Setting, out: Path, **changes: Any) -> list[str]:
        """Returns the command line of a run. A change that is None drops the flag."""
        at_once = max(1, 4 // setting.ranks)  # two micro-batches in a step
        flags = {
            "model_name_or_path": self.folder / "base",
            "data_path": self.folder / "train.json",
            "cache_dir": self.folder / "cache",
            "output_dir": out,
            "mode": "emo",
            "max_steps": STEPS,
            "global_batch": 2 * at_once * setting.ranks,
            "per_device_train_batch_size": at_once,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "model_max_length": 256,
            "disable_tqdm": True,
            "resume": "auto",
        } | changes
        given = [
            text
            for name, value in flags.items()
            if value is not None
            for text in (f"--{name}", str(value))
        ]
        return [*given, *setting.flags]

    def run(
        self,
        setting: Setting,
        out: Path,
        fault: Fault | None = None,
        kill_after: float | None = None,
        together: bool = False,
        more: Callable[[Hooks], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
        **changes: Any,
    ) -> Ended:
        """Trains into ``out``.

        Args:
            kill_after: all ranks are killed so many seconds after ``meanwhile`` has returned.
            together: all ranks are killed when one has died, as if their machine had lost power.
            more: installs further hooks; it must be picklable.
            meanwhile: is called once all ranks have been started.
        """
        argv, number = (
            self.argv(setting, out, **changes),
            len(list(out.parent.glob(f"{out.name}.text*"))),
        )
        outputs = [beside(out, f"text{number}-{rank}") for rank in range(setting.ranks)]
        out.parent.mkdir(parents=True, exist_ok=True)
        with LOCK:
            processes, pipes = start_ranks(
                outputs, command, (argv, str(out), fault, more), setting.launched
            )
        try:
            if meanwhile is not None:
                meanwhile()
            first = wait_for(processes, 1, LIMIT if kill_after is None else kill_after)
            if together or (kill_after is not None and not first):
                kill(processes)
            first_end = time.perf_counter()
            check(
                wait_for(processes, len(processes), LIMIT), f"{out}: did not end\n{read(outputs)}"
            )
            ended = time.perf_counter()
        finally:
            kill(processes)
            for pipe in pipes:
                pipe.close()
        with LOCK:
            statuses = [process.exitcode for process in processes]
        return Ended(statuses, read(outputs), ended - first_end)

    def finish(self, setting: Setting, out: Path, **kwargs: Any) -> Ended:
        """Trains until the end, and checks that every rank ended with status 0."""
        ended = self.run(setting, out, **kwargs)
        check(
            set(ended.statuses) == {0},
            f"it did not end: statuses {ended.statuses}\n{ended.text[-3000:]}",
        )
        return ended

    def reference(
        self, setting: Setting, fault: Fault | None = None, more: Any = None, **changes: Any
    ) -> Path:
        """Returns the output folder of a run to which nothing happened.

        The fault ``count`` makes it list what it writes.
        """
        about = sha256(repr((setting, fault, more, sorted(changes.items()))).encode()).hexdigest()[
            :8
        ]
        out = self.folder / "references" / f"{setting.name.replace(' ', '-')}-{about}"
        with LOCK:
            lock = self.locks.setdefault(out, threading.Lock())
        with lock:
            if out not in self.made:
                self.finish(setting, out, fault=fault, more=more, **changes)
                self.made.add(out)
        return out

    def copy(self, run: Path, out: Path, only: Sequence[int] | None = None) -> Path:
        """Copies a run's folder with all checkpoints, or with those of the steps ``only``.

        The final model is not copied. The rows that the run saw are copied up to the last copied
        checkpoint. Checkpoint files are hard links, so a file must be replaced and not written to.
        """
        from stanford_alpaca.checkpoint import manifest

        keep = [
            folder
            for folder in manifest.checkpoints(run)
            if only is None or manifest.step_of(folder) in only
        ]
        out.mkdir(parents=True)
        shutil.copy(run / "run.yaml", out)
        for folder in keep:
            shutil.copytree(folder, out / folder.name, copy_function=os.link)
        for file in run.parent.glob(f"{run.name}.seen*"):
            lines = file.read_text().splitlines(keepends=True)
            made = [
                line
                for line in lines
                if json.loads(line)[0] <= max(map(manifest.step_of, keep), default=0)
            ]
            beside(out, file.suffix[1:]).write_text("".join(made))
        return out
