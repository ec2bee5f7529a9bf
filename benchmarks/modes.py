"""Compares learning rates and gradient clipping for each mode.

Run ``python -m benchmarks.modes`` in the repository's root. It fine-tunes the shipped base model
once per mode, learning rate, clipping and seed, and prints tables. An interrupted run continues
where it stopped.
"""

import contextlib
import io
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.evaluation.measures.forced import teacher_forced
from stanford_alpaca.evaluation.measures.texts import exact_match
from stanford_alpaca.flags import exit_on_user_error, refuse_unknown
from stanford_alpaca.generation.responses import generate_batch, load_for_generation
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.losses.objectives import MODES
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.objective.head import head_of
from stanford_alpaca.train import train

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
BASE, TRAIN, HELD_OUT = (
    DATA / "tiny-base",
    DATA / "instructions" / "train.json",
    DATA / "instructions" / "held_out.json",
)
RECIPE = (
    "--per_device_train_batch_size 32 --global_batch 32 --lr_scheduler_type cosine "
    "--warmup_steps 0.03 --weight_decay 0"
)
QUIET = "--logging_steps 1 --save_strategy no --report_to none --disable_tqdm True"
# Identifies a run. Everything else in its line is measured.
KEY = ("mode", "learning_rate", "max_grad_norm", "seed", "epochs")
BEST = (
    "rate",
    "exact match %",
    "token accuracy %",
    "nll",
    "emo",
    "first norm",
    "norm 10 / 50 / 90 %",
    "steps clipped %",
)


def run(
    modes: Any = MODES,
    learning_rates: Any = (1e-4, 4e-4, 1.6e-3),
    max_grad_norms: Any = (1.0,),
    seeds: Any = (42,),
    epochs: int = 2,
    results: str = str(HERE / "results" / "modes.jsonl"),
    **unknown: Any,
) -> None:
    """Runs what the results file does not have yet, then prints the tables of all runs in it.

    Each run adds a line of JSON. Lists are given with commas: --modes emo,emo2. A max_grad_norm of
    0 turns clipping off: --max_grad_norms 1,0.
    """
    refuse_unknown(unknown, run)
    file = Path(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = read(file)
    done = {tuple(row[name] for name in KEY) for row in rows}
    wanted = [
        (mode, float(rate), float(clip), seed, epochs)
        for seed in as_list(seeds)
        for clip in as_list(max_grad_norms)
        for rate in as_list(learning_rates)
        for mode in as_list(modes)
    ]
    for key in wanted:
        if key not in done:
            start = time.perf_counter()
            rows.append(dict(zip(KEY, key, strict=True)) | one_run(*key))
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            print(f"{time.perf_counter() - start:.0f} s: {rows[-1]}", flush=True)
    print(tables([row for row in rows if row["epochs"] == epochs]))


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, tuple | list) else [value]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def one_run(
    mode: str, learning_rate: float, max_grad_norm: float, seed: int, epochs: int
) -> dict[str, float]:
    """Trains, evaluates, and summarizes the gradient norms of the steps.

    Evaluation uses the held-out examples, with greedy decoding and 32 new tokens.
    """
    with (
        TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        train(
            f"--model_name_or_path {BASE} --data_path {TRAIN} --output_dir {folder} --mode {mode} "
            f"--num_train_epochs {epochs} --learning_rate {learning_rate} "
            f"--max_grad_norm {max_grad_norm} --seed {seed} {RECIPE} {QUIET}".split()
        )
        history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
        scores = evaluate(folder)
    norms = torch.tensor([step["grad_norm"] for step in history if "grad_norm" in step])
    low, median, high = norms.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    clipped = (norms > max_grad_norm).float().mean().item() if max_grad_norm > 0 else 0.0
    figures = scores | {
        "norm_first": norms[0].item(),
        "norm_p10": low,
        "norm_median": median,
        "norm_p90": high,
    }
    figures = {name: float(f"{value:.5g}") for name, value in figures.items()}
    return figures | {"clipped": round(clipped, 3), "steps": len(norms)}


def evaluate(checkpoint: str) -> dict[str, float]:
    """Returns nll, emo, token accuracy and exact match.

    The first three are measured on the references, emo with the base model's costs. Exact match is
    measured on generated responses.
    """
    base, _ = load_for_generation(ModelSource(str(BASE)))
    model, tokenizer = load_for_generation(ModelSource(checkpoint))
    records = load_records(str(HELD_OUT))
    examples, _ = tokenize_records(records, tokenizer, 512)
    measures = teacher_forced(
        model, tokenizer, examples, CostEmbedding(head_of(base).weight), batch_size=32
    ).measures()
    responses = generate_batch(
        model, tokenizer, list(records), Sampling(max_new_tokens=32), batch_size=32
    )
    scores = {name: measures[name].value for name in ("nll", "emo", "token_accuracy")}
    return scores | {"exact_match": exact_match(responses, records["output"][:])}


# ---- tables --------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> str:
    """Returns two Markdown tables.

    The first shows exact match by clipping and learning rate. The second shows every mode at its
    best rate under clipping at 1.
    """
    columns = sorted({(-row["max_grad_norm"], row["learning_rate"]) for row in rows})
    names = [f"{rate:g}, {f'clip {-clip:g}' if clip else 'no clipping'}" for clip, rate in columns]
    grid, best = [["mode", *names]], [["mode", *BEST]]
    for mode in [mode for mode in MODES if any(row["mode"] == mode for row in rows)]:
        cells: dict[tuple, list] = {column: [] for column in columns}
        for row in rows:
            if row["mode"] == mode:
                cells[-row["max_grad_norm"], row["learning_rate"]].append(row)
        grid.append([mode, *(percent(cell, "exact_match") for cell in cells.values())])
        clipped_at_1 = [cell for (clip, _), cell in cells.items() if clip == -1 and cell]
        if clipped_at_1:
            best.append(
                [
                    mode,
                    *at_best(
                        max(
                            clipped_at_1,
                            key=lambda cell: (mean(cell, "exact_match"), -mean(cell, "nll")),
                        )
                    ),
                ]
            )
    return "\n\n".join(
        "\n".join(map(line, [table[0], ["---"] * len(table[0]), *table[1:]]))
        for table in (grid, best)
    )


def at_best(cell: list[dict[str, Any]]) -> list[str]:
    """Returns the ``BEST`` columns for the runs at one learning rate."""
    norms = " / ".join(
        f"{mean(cell, name):.2g}" for name in ("norm_p10", "norm_median", "norm_p90")
    )
    shares = [percent(cell, name) for name in ("exact_match", "token_accuracy")]
    means = [
        f"{mean(cell, 'nll'):.3f}",
        f"{mean(cell, 'emo'):.4f}",
        f"{mean(cell, 'norm_first'):.2g}",
    ]
    return [f"{cell[0]['learning_rate']:g}", *shares, *means, norms, percent(cell, "clipped")]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def percent(rows: list[dict[str, Any]], name: str) -> str:
    """Returns the mean over the seeds in percent, or "-" without runs.

    With several seeds, half of their range is added.
    """
    if not rows:
        return "-"
    values = [row[name] for row in rows]
    return f"{100 * mean(rows, name):.1f}" + (
        f" ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    )


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
