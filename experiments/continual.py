"""Does continual fine-tuning with EMO improve few-shot results?

This is the published comparison at a scale that fits a CPU.

    python experiments/continual.py --text_dir DIR --icl_dir DIR [--work DIR] [--limit N]

1. Trains a base that has read English: data/tiny-base, all weights, cross entropy on
   DIR/english.txt.gz.
2. Trains LoRA from it on DIR/wikitext2_valid.txt, once for each objective and seed. Measures nll
   and emo on the last 5 % of it.
3. Merges the adapters and evaluates them on the tasks of the other DIR, with 8 examples by TF-IDF.

A finished step is not repeated, so the same command continues an interrupted one. Writes
experiments/results/continual.json and .md.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import fire

ROOT = Path(__file__).resolve().parents[1]
MODES, SEEDS = ("mle", "emo2", "emo", "emd"), (0, 1, 2)
BASE = {
    "lora": False,
    "mode": "mle",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "max_sentences": 0,
}
# The other flags come from finetune.sh's recipe.
TUNED = {"learning_rate": 1e-3, "eval_fraction": 0.05, "save_strategy": "no"}
MEASURES = {"eval_nll": "nll", "eval_emo": "emo"}


def bash(*words: object) -> None:
    """Runs a command in the repository's root. If it fails, exits with its status."""
    command = list(map(str, words))
    print("$", *command, flush=True)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def flags(values: dict[str, object]) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def evaluate(model: Path, chosen: dict[str, object], out: Path) -> dict[str, float]:
    """Returns the accuracy of each task in %, and the mean of tasks."""
    file = out / "results.json"
    if not file.exists():
        bash(sys.executable, "icl.py", "--model_path", model, *flags(chosen | {"out": out}))
    (accuracy,) = json.loads(file.read_text())["accuracy"].values()
    return {task: 100 * statistics.mean(values) for task, values in accuracy.items()}


def cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Returns a table with a row per model and a column per measure.

    Cells are means and standard deviations over the seeds.
    """
    names = list(runs["mle"][0])
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for model, found in runs.items():
        cells = [
            cell([run[name] for run in found], 3 if name in MEASURES.values() else 1)
            if name in found[0]
            else ""
            for name in names
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(
    text_dir: str, icl_dir: str, work: str = "output/continual", limit: int | None = None
) -> None:
    """Runs the whole experiment; see the head of this file."""
    texts, folder = Path(text_dir).resolve(), (ROOT / work).resolve()
    chosen: dict[str, object] = {"data_dir": Path(icl_dir).resolve(), "retriever": "tfidf"}
    if limit is not None:
        chosen["limit"] = limit
    base = folder / "base"
    bash(
        "bash",
        "finetune.sh",
        ROOT / "data" / "tiny-base",
        base,
        *flags(BASE | {"data_path": texts / "english.txt.gz"}),
    )
    runs = {"base": [evaluate(base, chosen, folder / "icl" / "base")]}
    for mode in MODES:
        runs[mode] = []
        for seed in SEEDS:
            name = f"{mode}-{seed}"
            tuned, merged = folder / name, folder / f"{name}-merged"
            settings = TUNED | {
                "data_path": texts / "wikitext2_valid.txt",
                "mode": mode,
                "seed": seed,
            }
            bash("bash", "finetune.sh", base, tuned, *flags(settings))
            if not merged.exists():
                bash("bash", "merge.sh", tuned, merged)
            learned = json.loads((tuned / "eval_results.json").read_text())
            measured = {short: learned[name] for name, short in MEASURES.items()}
            runs[mode].append(measured | evaluate(merged, chosen, folder / "icl" / name))
    results = ROOT / "experiments" / "results"
    results.mkdir(exist_ok=True)
    (results / "continual.json").write_text(
        json.dumps({"limit": limit, "seeds": SEEDS, "runs": runs}, indent=1) + "\n"
    )
    (results / "continual.md").write_text(table(runs) + "\n")
    print(f"\n{table(runs)}")
    pair = ",".join(str(folder / f"{mode}-0-merged") for mode in ("mle", "emo2"))
    bash(sys.executable, "icl.py", "--model_path", pair, *flags(chosen))


if __name__ == "__main__":
    fire.Fire(run)
