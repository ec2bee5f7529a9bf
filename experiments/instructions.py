"""Does EMO answer better than cross entropy after instruction tuning?

This experiment has a scale that fits a CPU.

    python experiments/instructions.py --gsm8k FILE [--work DIR] [--processes N]

All runs train all weights of data/tiny-base, on the shipped instructions and on the first records
of FILE (GSM8K in Alpaca's form). They train `mle`, and `emo` with each weighting (paper, upstream)
and each cost (frozen, adaptive). Each is trained at several learning rates with the first seed. A
tenth of the training data is the development set. The rate with the least nll on it is then trained
with more seeds. The tests are the held-out instructions and the last records of FILE.

A finished run is not repeated, so the same command continues an interrupted one. Writes
experiments/results/instructions.json and .md.
"""

import json
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fire

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from experiments.tables import differences, keep, markdown, means
from stanford_alpaca.bench.tables import bold
from stanford_alpaca.bench.trials import Trial, best_rates, run_module, tried
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import exit_on_user_error

BASE = ROOT / "data" / "tiny-base"
ARMS = {
    "mle": ["--mode", "mle"],
    "emo": ["--mode", "emo"],
    "emo, adaptive": ["--mode", "emo", "--cost", "adaptive"],
    "emo, upstream": ["--mode", "emo", "--emo_weighting", "upstream"],
    "emo, upstream, adaptive": [
        "--mode",
        "emo",
        "--emo_weighting",
        "upstream",
        "--cost",
        "adaptive",
    ],
}
RATES, SEEDS = (2e-4, 5e-4, 1e-3), (0, 1, 2)
SHARED = (
    "--per_device_train_batch_size 8 --global_batch 32 --balance_lengths True --lr_scheduler_type "
    "cosine --warmup_steps 0.03 --save_strategy no --logging_steps 20 --eval_fraction 0.1 "
    "--resume auto --report_to none"
).split()
TRAINED, HELD_OUT = 2000, 300  # records of GSM8K
LOG = "log.txt"
ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # a run has one core
MEASURES = ("nll", "emo", "token_accuracy", "exact_match", "rouge_l", "ece", "costly_mass")


def split(gsm8k: Path, work: Path) -> dict[str, dict]:
    """Returns the data sets by name.

    Each says what to train on, for how many epochs, what to test on, and how long answers may be.
    """
    if not gsm8k.is_file():
        raise UserError(f"--gsm8k {gsm8k}: no such file; give GSM8K in Alpaca's form, a JSON list")
    records = json.loads(gsm8k.read_text(encoding="utf-8"))
    if len(records) < TRAINED + HELD_OUT:
        raise UserError(
            f"{gsm8k} has {len(records)} records: {TRAINED + HELD_OUT} are needed to test on "
            "others than were trained on"
        )
    work.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", records[:TRAINED]), ("test", records[-HELD_OUT:])):
        (work / f"gsm8k-{name}.json").write_text(json.dumps(part))
    shipped = ROOT / "data" / "instructions"
    return {
        "instructions": {
            "train": shipped / "train.json",
            "test": shipped / "held_out.json",
            "epochs": 3,
            "tokens": 64,
        },
        "gsm8k": {
            "train": work / "gsm8k-train.json",
            "test": work / "gsm8k-test.json",
            "epochs": 1,
            "tokens": 160,
        },
    }


def train(chosen: dict, trial: Trial, log: Path, out: Path) -> None:
    """Trains one run into a folder, on one core."""
    words = ["stanford_alpaca.train", "--model_name_or_path", BASE]
    words += ["--data_path", chosen["train"], "--output_dir", out]
    words += ["--num_train_epochs", chosen["epochs"], "--learning_rate", trial.learning_rate]
    words += ["--seed", trial.seed, *ARMS[trial.loss], *SHARED]
    run_module(log, words, ALONE)


def evaluate(chosen: dict, folders: dict[str, Path], out: Path) -> dict[str, dict[str, float]]:
    """Returns the measures of the base and of each arm on the test set."""
    if not (out / "metrics.json").exists():
        print(f"evaluating {out.parent.name}/{out.name}", flush=True)
        words = ["stanford_alpaca.evaluation.metrics", BASE, *folders.values()]
        words += ["--data", chosen["test"], "--out", out, "--samples", 0]
        words += ["--max_new_tokens", chosen["tokens"]]
        run_module(out.parent / LOG, words, ALONE)
    results = json.loads((out / "metrics.json").read_text())["results"]
    named = {"base": BASE} | folders
    return {
        arm: {name: results[str(folder)][name]["value"] for name in MEASURES}
        for arm, folder in named.items()
    }


def run(
    gsm8k: str, work: str = "output/instructions", processes: int = os.cpu_count() or 1
) -> None:
    """Runs the whole experiment; see the head of this file."""
    folder = (ROOT / work).resolve()
    runs, rates = [], {}
    with ThreadPoolExecutor(processes) as pool:
        for name, chosen in split(Path(gsm8k).resolve(), folder).items():
            here = folder / name
            here.mkdir(exist_ok=True)

            def start(trial: Trial, chosen: dict = chosen, here: Path = here) -> Future:
                return pool.submit(tried, trial, here, partial(train, chosen, trial, here / LOG))

            trials = [start(Trial(arm, rate, SEEDS[0])) for arm in ARMS for rate in RATES]
            found = [trial.result() for trial in trials]
            rates[name] = {
                arm: {
                    trial["learning_rate"]: trial["development_nll"]
                    for trial in found
                    if trial["loss"] == arm
                }
                for arm in ARMS
            }
            best = best_rates(found)
            made = {seed: {arm: Trial(arm, best[arm], seed) for arm in ARMS} for seed in SEEDS}
            for waiting in [start(trial) for arms in made.values() for trial in arms.values()]:
                waiting.result()
            folders = {
                seed: {arm: here / "runs" / trial.name for arm, trial in arms.items()}
                for seed, arms in made.items()
            }
            found = [
                pool.submit(evaluate, chosen, folders[seed], here / f"evaluation-{seed}")
                for seed in SEEDS
            ]
            for seed, measured in zip(SEEDS, found, strict=True):
                runs += [
                    {"setting": name, "arm": arm, "seed": seed, "measures": measures}
                    for arm, measures in measured.result().items()
                    if arm != "base" or seed == SEEDS[0]
                ]
    tables = [
        means(runs),
        "Differences, paired by seed, with 95 % intervals (Student's t):",
        differences(runs),
    ]
    tables += [
        "nll on the development set by learning rate, first seed; the least is chosen:",
        rates_table(rates),
    ]
    keep("instructions", {"rates": rates}, runs, "\n\n".join(tables))
    print("\n\n".join(tables))


def rates_table(rates: dict[str, dict[str, dict[float, float]]]) -> str:
    """Returns a table of nll by learning rate, the least in bold."""
    rows = [
        [name, arm, *bold(found)] for name, arms in rates.items() for arm, found in arms.items()
    ]
    return markdown(["", "", *[""] * len(RATES)], rows)


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
