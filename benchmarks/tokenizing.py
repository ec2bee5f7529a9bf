"""Times how long records take to become examples.

Run ``python -m benchmarks.tokenizing`` in the repository's root. It reads, tokenizes and masks as
training does, and then loads the result from the cache in a new process. Without --data it makes
50,000 records with lengths like Alpaca's: on average an instruction of 60 characters, an input in 2
of 5 records, and an output of 270.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import fire
from fire.decorators import SetParseFns

from stanford_alpaca.data.sources import Loading, load_source
from stanford_alpaca.flags import exit_on_user_error, refuse_unknown
from stanford_alpaca.models.load import ModelSource

ROOT = Path(__file__).resolve().parents[1]


@SetParseFns(data=str, model=str, cache_dir=str)
def run(
    data: str | None = None,
    model: str = str(ROOT / "data" / "tiny-base"),
    records: int = 50_000,
    num_proc: int = 2,
    max_length: int = 512,
    cache_dir: str | None = None,
    **unknown: Any,
) -> None:
    """Prints the seconds of a first and of a cached pass.

    Passes go over --data, or over made-up records.

    Args:
        data: a data file.
        model: the model whose tokenizer is used.
        records: number of made-up records.
        num_proc: processes that tokenize.
        max_length: tokens of an example at most.
        cache_dir: makes a single pass with this cache. The command calls itself with it.
    """
    refuse_unknown(unknown, run)
    if cache_dir is not None:
        tokenizer, began = ModelSource(model).tokenizer(), perf_counter()
        _, report = load_source(
            str(data), tokenizer, Loading(max_length, cache_dir=cache_dir, num_proc=num_proc)
        )
        print(f"{perf_counter() - began:.1f} s: {report}")
        return
    with TemporaryDirectory() as folder:
        file = data or str(made_up(Path(folder) / "made_up.json", records))
        command = [
            sys.executable,
            "-m",
            "benchmarks.tokenizing",
            f"--data={file}",
            f"--model={model}",
            f"--cache_dir={folder}/cache",
        ]
        for name in ("first", "cached"):
            done = subprocess.run(
                [*command, f"--num_proc={num_proc}", f"--max_length={max_length}"],
                cwd=ROOT,
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            print(f"{name}: {done.stdout.strip()}")


def made_up(file: Path, count: int) -> Path:
    """Writes records of random words from the shipped instructions, as a JSON list."""
    shipped = json.loads((ROOT / "data" / "instructions" / "train.json").read_text())
    words = sorted(
        {word for record in shipped for text in record.values() for word in text.split()}
    )
    rng = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(rng.choices(words, k=max(1, round(rng.expovariate(6 / mean)))))

    rows = [
        {
            "instruction": text(60),
            "input": text(70) if rng.random() < 0.4 else "",
            "output": text(270),
        }
        for _ in range(count)
    ]
    file.write_text(json.dumps(rows))
    return file


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
