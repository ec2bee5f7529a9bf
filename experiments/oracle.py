"""Does EMO bring a model closer to the truth?

This is the published comparison where the truth is known, at a scale that fits.

    python experiments/oracle.py --text_dir DIR [--scale cpu] [--work DIR] [--processes N]

1. An oracle learns DIR/english.txt.gz. A smaller model learns half of it and
   DIR/wikitext2_valid.txt. All students start from this smaller model.
2. The oracle writes a corpus, a development set and a test set.
3. Students train on several amounts of the corpus, for each objective at several learning rates.
   The rate with the least nll on the development set is trained with more seeds. All objectives
   take the same steps.
4. Each student is compared with the oracle on the test set: see
   stanford_alpaca/evaluation/measures/oracle.py and the README.md beside this file.

A finished part is not repeated, so the same command continues an interrupted one. Writes
experiments/results/oracle-SCALE.json, .md and .png.
"""

import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import fire
import torch

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from experiments.measuring import measure
from experiments.students import (
    Student,
    device,
    make_tokenizer,
    pretrain,
    sample,
    sequences_of,
    spent,
    train,
)
from experiments.tables import RESULTS, differences, keep, markdown, means, plot
from stanford_alpaca.bench.tables import Run, bold
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error

PLOTTED = [
    "perplexity",
    "oracle_perplexity",
    "mauve",
    "total_variation",
    "transport_cost",
    "optimal_transport",
]


@dataclass(frozen=True)
class Scale:
    """The size of an experiment.

    Models are given as (width, layers), and amounts of data as (sequences, epochs, learning rates
    to choose from).
    """

    objectives: tuple[str, ...]
    oracle: tuple[int, int]
    students: tuple[tuple[int, int], ...]
    vocab_sizes: tuple[int, ...]
    data: tuple[tuple[int, int, tuple[float, ...]], ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 2  # epochs of the oracle and the start
    test: int = 800
    rows: int | None = None  # rows of 64 tokens of each text that oracle and start learn; None: all


TEXTS = ("english.txt.gz", "wikitext2_valid.txt")
FEW = ("mle", "emo", "emo2", "tailr", "identity")
ALL = (*FEW, "emd", "mix", "mixce", "dft")
LOW, MIDDLE, HIGH = (3e-5, 1e-4, 3e-4, 1e-3), (1e-4, 3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3, 1e-2)
LITTLE_TO_MUCH = ((500, 8, LOW), (2000, 4, MIDDLE), (8000, 1, HIGH))
TEN_TIMES = ((4000, 8, LOW), (32000, 4, MIDDLE), (256000, 1, HIGH))
SCALES = {
    "cpu": Scale(FEW, (160, 4), ((96, 2),), (2048,), LITTLE_TO_MUCH),
    "sizes": Scale(
        ("mle", "emo"), (160, 4), ((64, 2), (128, 3)), (1024, 4096), ((2000, 4, MIDDLE),)
    ),
    "gpu": Scale(ALL, (1024, 12), ((384, 6), (768, 12)), (4096, 32768), TEN_TIMES, test=4000),
    "smoke": Scale(
        ("mle", "emo"), (64, 1), ((32, 1),), (512,), ((80, 1, (1e-3, 3e-3)),), (0, 1), 1, 24, 200
    ),
}


def prepare(scale: Scale, vocab_size: int, shape: tuple[int, int], texts: Path, work: Path) -> Path:
    """Prepares all that the students of one vocabulary and one start need.

    Returns their folder.
    """
    english, wiki = (texts / name for name in TEXTS)
    folder = work / f"v{vocab_size}"
    tokenizer = make_tokenizer([english, wiki], vocab_size, folder / "tokenizer")
    if not (folder / "oracle").exists():
        pretrain(
            sequences_of([english], tokenizer)[: scale.rows],
            scale.oracle,
            tokenizer,
            scale.epochs,
            folder / "oracle",
        )
    here = folder / f"w{shape[0]}"
    if not (here / "start").exists():
        half = sequences_of([english], tokenizer)[: scale.rows]
        pretrain(
            torch.cat([half[: len(half) // 2], sequences_of([wiki], tokenizer)[: scale.rows]]),
            shape,
            tokenizer,
            scale.epochs,
            here / "start",
        )
    sizes = {
        "corpus": max(sequences for sequences, *_ in scale.data),
        "dev": max(scale.test // 4, 8),
        "test": scale.test,
    }
    for seed, (name, count) in enumerate(sizes.items()):
        sample(folder / "oracle", count, 10**6 * (seed + 1), folder / f"{name}.pt")
        if not (here / f"{name}.pt").exists():
            (here / f"{name}.pt").symlink_to(Path("..") / f"{name}.pt")
    return here


def students_of(
    scale: Scale, here: Path, run: Callable[[Callable, Iterable], None]
) -> dict[Student, dict[float, float]]:
    """Trains the students that are missing.

    Returns the students of the best rates, each with its nll on the development set by rate.
    """
    first, chosen = scale.seeds[0], {}
    tried = [
        Student(o, n, e, rate, first)
        for n, e, rates in scale.data
        for o in scale.objectives
        for rate in rates
    ]
    run(train, [(student, here) for student in reversed(tried)])
    for n, epochs, rates in scale.data:
        for objective in scale.objectives:
            found = {}
            for rate in rates:
                file = (
                    here / "students" / Student(objective, n, epochs, rate, first).name / "dev.json"
                )
                found[rate] = json.loads(file.read_text())["dev_nll"]
            best = min(found, key=found.__getitem__)
            chosen |= {Student(objective, n, epochs, best, seed): found for seed in scale.seeds}
    run(train, [(student, here) for student in reversed(chosen)])
    return chosen


def pool(processes: int) -> Callable[[Callable, Iterable], None]:
    """Returns a function that runs calls of a function in parallel, on one core each.

    With one process, the calls run one after another in this process.
    """

    def run(function: Callable, calls: Iterable[tuple]) -> None:
        if processes == 1:
            for call in calls:
                function(*call)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as workers:
            for done in [workers.submit(function, *call) for call in calls]:
                done.result()

    return run


def run(
    text_dir: str, scale: str = "cpu", work: str = "output/oracle", processes: int | None = None
) -> None:
    """Runs the whole experiment; see the head of this file."""
    if scale not in SCALES:
        raise UserError(f"--scale {scale}: choose from {', '.join(SCALES)}")
    for name in TEXTS:
        if not (Path(text_dir) / name).is_file():
            raise UserError(f"--text_dir {text_dir} has no {name}: see experiments/README.md")
    for package in ("mauve", "ot", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UserError("this needs some packages: pip install mauve-text POT matplotlib")
    chosen, texts, folder = SCALES[scale], Path(text_dir).resolve(), (ROOT / work / scale).resolve()
    at_once = pool(processes or (1 if device() == "cuda" else os.cpu_count() or 1))
    runs, rates = [], []
    for vocab_size in chosen.vocab_sizes:
        for shape in chosen.students:
            here = prepare(chosen, vocab_size, shape, texts, folder)
            found, size = (
                students_of(chosen, here, at_once),
                f"{vocab_size} tokens, width {shape[0]}, ",
            )
            runs += measured(
                chosen,
                found,
                here,
                size if len(chosen.vocab_sizes) * len(chosen.students) > 1 else "",
                at_once,
            )
            rates += [
                [f"{size}{student.sequences} sequences", student.objective, *bold(nll)]
                for student, nll in found.items()
                if student.seed == chosen.seeds[0]
            ]
    tables = [
        means(runs),
        "Differences, paired by seed, with 95 % intervals (Student's t):",
        differences(runs),
    ]
    tables += [
        "nll on the development set by learning rate, first seed; the least is chosen:",
        markdown(["", "", "", "", "", ""], rates),
    ]
    keep(
        f"oracle-{scale}",
        {"scale": asdict(chosen), "rates": rates, "cpu_minutes": spent(folder)},
        runs,
        "\n\n".join(tables),
    )
    plot(runs, PLOTTED, "", RESULTS / f"oracle-{scale}.png")
    print("\n\n".join(tables))


def measured(
    scale: Scale, students: Iterable[Student], here: Path, size: str, run: Callable
) -> list[Run]:
    """Measures every student, their start, and the oracle itself against the oracle."""
    files = {student: here / "measured" / f"{student.name}.json" for student in students}
    ends = {"start": here / "start", "oracle": here.parent / "oracle"}
    run(
        measure,
        [(folder, here, 0, here / "measured" / f"{name}.json") for name, folder in ends.items()],
    )
    run(
        measure,
        [
            (here / "students" / student.name, here, student.seed, file)
            for student, file in files.items()
        ],
    )
    runs = []
    for sequences, *_ in scale.data:
        setting = f"{size}{sequences} sequences"
        for name in ends:
            values = json.loads((here / "measured" / f"{name}.json").read_text())
            runs.append({"setting": setting, "arm": name, "seed": 0, "measures": values})
        for student, file in files.items():
            if student.sequences == sequences:
                values = json.loads(file.read_text())
                runs.append(
                    {
                        "setting": setting,
                        "arm": student.objective,
                        "seed": student.seed,
                        "measures": values,
                    }
                )
    return runs


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
