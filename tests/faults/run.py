"""Injects faults into training runs and checks what must hold.

Usage: ``python tests/faults/run.py [--full] [--only ROW]``

Without ``--full`` a fixed part of each row is run. A case is drawn from the seed and its number
alone. The exit status is 1 if a case is lost.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore:resource_tracker",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
}
os.environ.update(ENVIRONMENT)

from tests.faults import caches, contents, disks, fuzzed, kills, nonfinite, resuming, stops
from tests.faults.harness import Case, Lost, NotHere, Row
from tests.faults.world import World

THEMES = (kills, stops, disks, caches, contents, resuming, nonfinite, fuzzed)
ROWS: dict[str, Row] = {name: row for theme in THEMES for name, row in theme.ROWS.items()}
# Without --full, one case in PART is run, and at most MOST of a row. test_fuzz.py tries more inputs
# in less time.
PART, MOST = 20, 3
SEED = 0
LINE = "{:32}{:>7}{:>7}{:>7}{:>9}"


def cases_of(row: str, seed: int) -> list[Case]:
    """Returns all cases of a row, which follow from the seed alone."""
    return ROWS[row](Random(f"{row} {seed}"))


def part_of(count: int) -> list[int]:
    """Returns the numbers of the cases that are run without ``--full``; they never change."""
    return sorted(Random(count).sample(range(count), min(MOST, -(-count // PART))))


def hold(world: World, row: str, seed: int, number: int) -> str | None:
    """Runs one case. Returns None if it holds, or else what does not hold."""
    case = cases_of(row, seed)[number]
    folder = world.folder / "cases" / f"{row.replace(' ', '-')}-{number}"
    try:
        case.holds(world, folder / "out")
    except Lost as lost:
        return f"{case.what}: {shortened(str(lost))}"
    except NotHere as error:
        print(f"not here: {case.what}: {error}", file=sys.stderr)
    except Exception:
        return f"{case.what}: {shortened(traceback.format_exc())}"
    shutil.rmtree(folder, ignore_errors=True)
    return None


def shortened(text: str) -> str:
    """Returns the first line of a text and its last twelve, without progress bars."""
    first, *rest = [line for line in text.splitlines() if line.strip() and "it/s]" not in line]
    return "\n    ".join([first, *rest[-12:]])


def main() -> int:
    options = parsed()
    rows = [row for row in ROWS if options.only in row]
    print(LINE.format("row", "cases", "held", "lost", "seconds"))
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads shards
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(options.keep or name)
        folder.mkdir(parents=True, exist_ok=True)
        world = World(folder)
        table = [run_row(row, world, pool, options) for row in rows]
    total = {name: sum(row[name] for row in table) for name in ("cases", "lost", "seconds")}
    print(shown({"row": "all"} | total))
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1))
    return 1 if total["lost"] else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all cases")
    parser.add_argument("--seed", type=int, default=SEED, help="draws what is injected where")
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--case", type=int, help="one case of them, by its number")
    parser.add_argument("--json", help="also writes the table here")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--keep", help="a new folder for all files of the runs, which is kept")
    options = parser.parse_args()
    if not any(options.only in row for row in ROWS):
        parser.error(f"--only {options.only}: none of {', '.join(ROWS)}")
    return options


def run_row(
    row: str, world: World, pool: ThreadPoolExecutor, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs and prints the cases of a row. Returns its line of the table."""
    start, count = time.perf_counter(), len(cases_of(row, options.seed))
    numbers = list(range(count)) if options.full else part_of(count)
    numbers = numbers if options.case is None else [options.case]
    outcomes = pool.map(lambda number: hold(world, row, options.seed, number), numbers)
    lost = {
        number: outcome
        for number, outcome in zip(numbers, outcomes, strict=True)
        if outcome is not None
    }
    seconds = round(time.perf_counter() - start)
    found = {"row": row, "cases": len(numbers), "lost": len(lost), "seconds": seconds}
    print(shown(found), flush=True)
    for number, outcome in lost.items():
        again = f'{Path(__file__).relative_to(ROOT)} --seed {options.seed} --only "{row}"'
        print(f"  lost: {outcome}\n  again: python {again} --case {number}", flush=True)
    return found


def shown(row: dict[str, Any]) -> str:
    held = row["cases"] - row["lost"]
    return LINE.format(row["row"], row["cases"], held, row["lost"], row["seconds"])


if __name__ == "__main__":
    sys.exit(main())
