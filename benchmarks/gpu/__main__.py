"""Proves and measures the most in one short run on one GPU: ``bash tests/gpu.sh``.

The parts are commands of their own. Each has a time after which it is ended, so a failure or a
hang of one never hides the next. What counts most comes first. ``benchmarks/README.md`` says how to
read the table.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.figures import ROOT, cells

PARTS = "benchmarks.gpu"
GRACE = 6  # seconds between SIGTERM and SIGKILL
TOY_SECONDS = 3600  # of all parts together; only a hang takes this long
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Group:
    """Parts that run side by side, and the second of the run at which they are ended."""

    parts: tuple[str, ...]
    until: int
    until_of_all: int  # with --all


# Kernels and training are checked for what they compute, not timed: they share the GPU.
GROUPS = (
    Group(("kernels", "training"), 100, 140),
    Group(("loss",), 215, 320),
    Group(("whole",), 300, 430),
    Group(("profile",), 345, 500),
    Group(("blocks",), 0, 570),
)


def run(given: argparse.Namespace) -> bool:
    """Runs all parts, prints the table, and returns whether nothing failed."""
    began, report = time.monotonic(), {"machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        for group in GROUPS:
            until = TOY_SECONDS if given.toy else group.until_of_all if given.all else group.until
            if not (group.until or given.all or given.toy):
                continue
            started = {name: start(name, given, scratch) for name in group.parts}
            try:
                for name, process in started.items():
                    status = finish(process, until - (time.monotonic() - began))
                    report["parts"][name] = collected(given.out, name, status)
                    keep(given.out, report)
                    figures = report["parts"][name]["figures"]
                    took = time.monotonic() - began
                    print(f"{took:5.0f} s  {name}: {status}, {len(figures)} figures", flush=True)
            finally:
                for process in started.values():
                    end(process)
    print(table(report))
    return not failures(report)


def start(name: str, given: argparse.Namespace, scratch: str) -> subprocess.Popen:
    """Starts a part in a session of its own, so that all it starts can be ended with it."""
    words = ["--out", str(given.out / f"{name}.json")]
    words += [f"--{flag}" for flag in ("toy", "all") if getattr(given, flag)]
    words += ["--states", str(given.states)] if given.states else []
    environment = os.environ | ENVIRONMENT | {"TMPDIR": scratch}
    if given.toy:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    else:
        environment.pop("TRITON_INTERPRET", None)
    with (given.out / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"{PARTS}.{name}", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, seconds: float) -> str:
    """Waits for a part, ends it if its time is over, and says how it ended."""
    try:
        status = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        end(process)
        return "out of time"
    end(process)
    return "done" if status == 0 else f"ended with status {status}"


def end(process: subprocess.Popen) -> None:
    """Ends a part and whatever is left of its session: SIGTERM, then SIGKILL."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    for left in session(process.pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(left, signal.SIGKILL)
    process.wait()


def session(leader: int) -> list[int]:
    """Returns the processes of a session, also those in process groups of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


def collected(out: Path, name: str, status: str) -> dict[str, Any]:
    """Moves a part's figures from its file into the report: few files come back from a machine."""
    file = out / f"{name}.json"
    figures = json.loads(file.read_text()) if file.exists() else []
    file.unlink(missing_ok=True)
    file.with_suffix(".tmp").unlink(missing_ok=True)
    lines = (out / f"{name}.log").read_text(errors="replace").split("\n")
    why = "" if status == "done" else next((each for each in reversed(lines) if each.strip()), "")
    return {"status": status, "last_line": why, "figures": figures}


def keep(out: Path, report: dict[str, Any]) -> None:
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")


def failures(report: dict[str, Any]) -> list[str]:
    """Returns the parts that did not end well, and the figures that are wrong."""
    failed = []
    for name, part in report["parts"].items():
        if part["status"] != "done":
            failed.append(f"{name}: {part['status']}; {part['last_line']}")
        failed += [f"{name}: {each['what']}" for each in part["figures"] if each["ok"] is False]
    return failed


def table(report: dict[str, Any]) -> str:
    """Returns all figures as a table, and what failed below it."""
    rows = [
        (name, *cells(figure))
        for name, part in report["parts"].items()
        for figure in part["figures"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1] if rows else []
    lines = [
        "  ".join(
            [*(f"{cell:{width}}" for cell, width in zip(row, [*widths, 0], strict=True))]
        ).rstrip()
        for row in rows
    ]
    failed = failures(report)
    return "\n".join([*lines, *(f"failed: {each}" for each in failed), f"{len(failed)} failed"])


def machine() -> dict[str, Any]:
    """Describes the machine without importing torch, and without anything that identifies it."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = None
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return {
        "gpu": found or None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__)
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("--toy", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--all", action="store_true", help="also what takes over 6 minutes")
    default = Path(os.environ.get("OUT") or ROOT / "output" / "gpu")
    parser.add_argument("--out", type=Path, default=default, help="folder of gpu.json and the logs")
    parser.add_argument("--states", type=Path, help="a file of benchmarks.states")
    parser.add_argument("--expected", action="store_true", help="write a CPU's losses anew")
    given = parser.parse_args()
    if given.expected:
        command = [sys.executable, "-m", "benchmarks.gpu.training", "--expected"]
        sys.exit(subprocess.call(command, cwd=ROOT))
    if given.states and not given.states.is_file():
        refuse(f"--states {given.states}: no such file")
    if (given.out / "gpu.json").exists() or (given.out.exists() and not given.out.is_dir()):
        refuse(f"--out {given.out}: it has results; give another folder, or remove it")
    given.out = given.out.absolute()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(0 if run(given) else 1)


if __name__ == "__main__":
    main()
