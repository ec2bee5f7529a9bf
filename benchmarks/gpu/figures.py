"""What the parts of ``benchmarks.gpu`` share: their settings, and how their figures are kept."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """How a part runs.

    Attributes:
        out: the JSON file of its figures.
        toy: tiny shapes on a CPU, in Triton's interpreter.
        all: also what the short run leaves out.
        states: a file of ``benchmarks.states``.
    """

    out: Path
    toy: bool = False
    all: bool = False
    states: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"


@dataclass(frozen=True)
class Figure:
    """A line of the table. ``ok`` is None where nothing is judged."""

    what: str
    value: float | str | None = None
    unit: str = ""
    note: str = ""
    ok: bool | None = None
    raw: Any = None  # what the value was computed from


@dataclass
class Figures:
    """The figures of a part, which are written to its file as they are found.

    So a part that runs out of time keeps what it has.
    """

    out: Path
    found: list[Figure] = field(default_factory=list)

    def add(self, *given: Any, **named: Any) -> None:
        """Adds a ``Figure`` of these fields, prints it, and writes all figures."""
        figure = Figure(*given, **named)
        self.found.append(figure)
        print(line(asdict(figure)), flush=True)
        written = self.out.with_suffix(".tmp")
        written.write_text(json.dumps([asdict(each) for each in self.found]))
        written.replace(self.out)

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measures, and adds a failed figure if that raises."""
        try:
            measure()
        except Exception as error:  # whatever it was, the next measurement still counts
            import traceback

            traceback.print_exc()
            self.add(what, note=f"{type(error).__name__}: {short(error)}", ok=False)


def short(error: object) -> str:
    return " ".join(str(error).split())[:200]


def line(figure: dict[str, Any]) -> str:
    """Returns a figure as one line."""
    return "  ".join(cell for cell in cells(figure) if cell)


def cells(figure: dict[str, Any]) -> tuple[str, str, str, str]:
    value = figure["value"]
    shown = "" if value is None else value if isinstance(value, str) else f"{value:.4g}"
    judged = {None: "", True: "ok", False: "FAILED"}[figure["ok"]]
    return figure["what"], f"{shown} {figure['unit']}".strip(), judged, figure["note"]


def arguments(words: list[str]) -> Setting:
    """Reads a part's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--states")
    return Setting(**vars(parser.parse_args(words)))


def main(run: Callable[[Setting, Figures], None]) -> None:
    """Runs a part. SIGTERM ends it as an exception does, so that it stops what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    setting = arguments(sys.argv[1:])
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("DS_ACCELERATOR", setting.device)
    run(setting, Figures(setting.out))
