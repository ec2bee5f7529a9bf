"""What does EMO do to real models?

    python experiments/real.py --part E0 --models DIR --data DIR [--work DIR]

A part is a module with ``jobs``, ``summary``, ``table`` and ``plot``. Each job is one run, and
leaves one small JSON in --work. A finished run is not repeated, so the same command goes on where
it stopped. Writes experiments/results/real-PART.json, .md and .png.

``--models`` has the folders smollm2-135m and gemma3-270m, ``--data`` has english.txt.gz. Nothing is
downloaded.
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

from experiments import stationary
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error

RESULTS = ROOT / "experiments" / "results"
PARTS: dict[str, ModuleType] = {"E0": stationary}


def run(part: str, models: str, data: str, work: str = "output/real") -> None:
    """Runs a part; see the head of this file."""
    if part not in PARTS:
        raise UserError(f"--part {part}: choose from {', '.join(PARTS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("this needs a package: pip install matplotlib")
    module, places = PARTS[part], [Path(models).expanduser(), Path(data).expanduser()]
    for flag, place, wanted in zip(
        ("models", "data"), places, (module.MODELS, (module.TEXT,)), strict=True
    ):
        for name in wanted:
            if not (place / name).exists():
                raise UserError(f"--{flag} {place} has no {name}: see experiments/README.md")
    folder = (ROOT / work / part).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for name, job in module.jobs(*places).items():
        file = folder / f"{name}.json"
        if not file.exists():
            print(f"making {name}", flush=True)
            found = file.with_suffix(".part")
            found.write_text(json.dumps(job(), allow_nan=False))
            found.replace(file)
        runs.append(json.loads(file.read_text()))
    summary = module.summary(runs)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"real-{part}.json").write_text(json.dumps(summary, indent=1) + "\n")
    (RESULTS / f"real-{part}.md").write_text(module.table(summary) + "\n")
    module.plot(summary, RESULTS / f"real-{part}.png")
    print(module.table(summary))


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
