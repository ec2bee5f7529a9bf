"""Times the checks a run makes on its data before it loads a model.

Run ``python -m benchmarks.checks`` in the repository's root. It times two stages, each with a fresh
cache: ``check_sources``, which reads and checks every record, as ``train`` does first; and
``load_data``, which also tokenizes. It also times one record of 10 MB and the cost of looking for
duplicate keys. Each case appends one line of JSON to benchmarks/results/checks.jsonl.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import fire

from benchmarks.tokenizing import ROOT, made_up
from stanford_alpaca.data import reading
from stanford_alpaca.data.sources import Loading, check_sources
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_whole, check_writable, exit_on_user_error, refuse_unknown
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.run.data import load_data
from stanford_alpaca.run.parse import parse

MODEL = ROOT / "data" / "tiny-base"


def run(
    records: int = 50_000,
    results: str = str(ROOT / "benchmarks" / "results" / "checks.jsonl"),
    **unknown: Any,
) -> None:
    """Prints seconds and records per second.

    Args:
        records: number of made-up records. Their lengths are like those of Alpaca.
        results: the file to append to.
    """
    refuse_unknown(unknown, run)
    check_whole("records", records, 1)
    check_writable("results", Path(results))
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        many, large, deep = (
            made_up(folder / "many.json", records),
            folder / "large.json",
            folder / "deep.json",
        )
        large.write_text(
            json.dumps([{"instruction": "Repeat.", "output": "word and word " * 750_000}])
        )
        deep.write_text("[" * 100_000)
        cases: dict[str, tuple[int, Callable[[], object]]] = {
            "check_sources": (
                records,
                lambda: check_sources([str(many)], Loading(512, cache_dir=str(folder / "1"))),
            ),
            "load_data": (records, lambda: load(many, folder / "2")),
            "read_file": (records, lambda: sum(1 for _ in reading.read_file(many))),
            "read_file, duplicate keys not looked for": (records, lambda: without_hook(many)),
            "load_data of a record of 10 MB": (1, lambda: load(large, folder / "3")),
            "load_data of 100,000 brackets": (1, lambda: load(deep, folder / "4")),
        }
        for case, (count, call) in cases.items():
            seconds = seconds_of(call)
            rows.append(
                {
                    "case": case,
                    "records": count,
                    "seconds": round(seconds, 2),
                    "cores": len(os.sched_getaffinity(0)),
                }
            )
            print(f"{case}: {seconds:.2f} s, {count / seconds:,.0f} records/s", flush=True)
    with Path(results).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def load(file: Path, cache: Path) -> None:
    """Loads the data as ``train`` does. A UserError is printed and also ends the call."""
    argv = {
        "model_name_or_path": MODEL,
        "data_path": file,
        "output_dir": cache / "out",
        "cache_dir": cache,
    }
    given = parse([text for name, value in argv.items() for text in (f"--{name}", str(value))])
    tokenizer = ModelSource(str(MODEL)).tokenizer(given.training.model_max_length)
    try:
        load_data(given.data, given.training, tokenizer)
    except UserError as error:
        print(error)


def without_hook(file: Path) -> int:
    """Counts the records of a file with a decoder that does not look for duplicate keys."""
    decoder, reading.JSON = reading.JSON, json.JSONDecoder()
    try:
        return sum(1 for _ in reading.read_file(file))
    finally:
        reading.JSON = decoder


def seconds_of(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
