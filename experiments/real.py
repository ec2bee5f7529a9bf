"""What does EMO do to real models?

    python experiments/real.py --part PART --models DIR --data DIR [--runs DIR] [--plan]

A part is a module with ``jobs``, ``summary``, ``table`` and ``plot``. Each job is one run, and
leaves one small JSON in --runs, and its adapter in --work. A finished run is not repeated, so the
same command goes on where it stopped. Started twice, it shares the runs between two processes. When
all are finished, it writes experiments/results/real-PART.json, .md and .png. ``--finished`` makes
none, needs no models, and writes these of the runs that are finished. The runs behind the published
tables are in experiments/results/runs; another --runs makes them anew.

``--plan`` makes a few short runs, and prints each margin beside the half-width to expect.

``--models`` has the folders, and ``--data`` the text, that the part's MODELS and TEXT name. Nothing
is downloaded.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import fire

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from experiments import answering, stationary, tuning, writing
from experiments.jobs import Jobs, Places, make, read
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error

RESULTS = ROOT / "experiments" / "results"
PARTS: dict[str, ModuleType] = {"E0": stationary, "E1": tuning, "E1-text": writing, "E3": answering}
PLANNED = {part for part, module in PARTS.items() if hasattr(module, "plan")}


def run(
    part: str,
    models: str = ".",
    data: str = ".",
    runs: str = "experiments/results/runs",
    work: str = "output/real",
    plan: bool = False,
    finished: bool = False,
) -> None:
    """Runs a part; see the head of this file."""
    if part not in PARTS:
        raise UserError(f"--part {part}: choose from {', '.join(PARTS)}")
    if plan and part not in PLANNED:
        raise UserError(f"--plan: part {part} has no margins")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("this needs a package: pip install matplotlib")
    module = PARTS[part]
    inputs = (Path(models).expanduser(), Path(data).expanduser())
    places = Places(*inputs, (ROOT / work).resolve(), (ROOT / runs).resolve())
    folder = places.runs / part
    jobs: Jobs = module.pilots(places) if plan else module.jobs(places)
    if not finished:
        check(places, module)
        folder.mkdir(parents=True, exist_ok=True)
        make(jobs, folder)
    found = read(jobs, folder)
    if len(found) < len(jobs) and not finished:
        print(f"{len(jobs) - len(found)} of {len(jobs)} runs are being made by other processes")
    elif not found:
        raise UserError(f"--finished: {folder} has no run of part {part}")
    elif plan:
        print(module.plan(found))
    else:
        write(part, module, found)


def check(places: Places, module: ModuleType) -> None:
    """Raises UserError unless the part finds its models and its text."""
    for flag, place, wanted in (
        ("models", places.models, module.MODELS),
        ("data", places.data, module.TEXT),
    ):
        for name in wanted:
            if not (place / name).exists():
                raise UserError(f"--{flag} {place} has no {name}: see experiments/README.md")


def write(part: str, module: ModuleType, runs: list[dict]) -> None:
    """Writes and prints the results of a part."""
    summary = module.summary(runs)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"real-{part}.json").write_text(json.dumps(summary, indent=1) + "\n")
    (RESULTS / f"real-{part}.md").write_text(module.table(summary) + "\n")
    module.plot(summary, RESULTS / f"real-{part}.png")
    print(module.table(summary))


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
