"""Checks that every engine trains what one process trains.

Usage: ``python tests/exactness/run.py [--only TEXT] [--json FILE]``

Runs the combinations of ``combinations.py`` on CPU, with gloo, in float32. Compares the loss and
gradient norm of each step with those of one process that has no engine and the same global batch.
The exit status is 1 if two runs are not equal.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Ranks exit without cleaning up their shared resources: the parent does it.
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"

from tests.exactness.combinations import EXCLUDED, Combination, covering
from tests.helpers import steps
from tests.ranks import RanksFailed, run_ranks

STEPS, GLOBAL_BATCH = 10, 16
# Runs are equal within these differences: absolute in the loss, relative in the gradient norm.
LOSS, NORM = 1e-5, 1e-4


def write_inputs(folder: Path) -> None:
    """Writes a random Llama with an untied output layer, and two data sets for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(
        "llama",
        vocab_size=2048,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,
        **shape,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-base").save_pretrained(folder / "model")
    records = json.loads((ROOT / "data" / "instructions" / "train.json").read_text())
    even = [{**record, "output": "A robin is a bird."} for record in records[:32]]
    uneven = [
        {**record, "output": " ".join(["robin"] * (1 if i % 3 else 5 * i))}
        for i, record in enumerate(records[:21], 1)
    ]
    for name, data in {"even": even, "uneven": uneven}.items():
        (folder / f"{name}.json").write_text(json.dumps(data))


def argv(folder: Path, c: Combination) -> list[str]:
    """Returns the command line of a combination, or of a reference if its engine is ``none``."""
    flags = {
        "model_name_or_path": folder / "model",
        "data_path": folder / f"{c.targets}.json",
        "cache_dir": folder / "cache",
        "output_dir": folder / str(c),
        "mode": "emo",
        "cost_sharding": c.cost,
        "max_steps": STEPS,
        "global_batch": GLOBAL_BATCH,
        "per_device_train_batch_size": GLOBAL_BATCH // c.processes // c.accumulation,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lora": c.trained == "lora",
        "engine": c.engine,
        "packing": c.rows == "packed",
        "model_max_length": 256,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def run(folder: Path, c: Combination) -> list[dict]:
    """Returns what a run logged at each step.

    A run that was made before, such as a reference, is read and not repeated.
    """
    from stanford_alpaca.train import train

    if not (folder / str(c)).exists():
        run_ranks(c.processes, train, argv(folder, c), launched=c.engine != "none")
    return steps(folder / str(c))


def deviations(folder: Path, c: Combination) -> tuple[float, float]:
    """Returns the greatest differences from one process over all steps.

    These are the absolute difference of the loss and the relative one of the gradient norm.
    """
    reference = run(folder, Combination("none", "replicate", 1, 1, c.targets, c.trained, c.rows))
    pairs = list(zip(reference, run(folder, c), strict=True))
    # The reference has learned something.
    assert len(pairs) == STEPS and reference[-1]["loss"] < reference[0]["loss"] - 0.1
    loss = max(abs(one["loss"] - two["loss"]) for one, two in pairs)
    return loss, max(
        abs(one["grad_norm"] - two["grad_norm"]) / one["grad_norm"] for one, two in pairs
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="combinations whose line has this text")
    parser.add_argument("--json", help="also writes the table here")
    options = parser.parse_args()
    chosen = [c for c in covering() if options.only in str(c)]
    if not chosen:
        parser.error(f"--only {options.only}: no such combination")
    rows = []
    line = "{:7}{:16}{:>10}{:>14}{:>9}{:>9}{:>8}{:>12}{:>15}{:>9}  {}"
    print(line.format(*Combination._fields, "loss", "gradient norm", "seconds", ""))
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        write_inputs(Path(name))
        for c in chosen:
            start = time.perf_counter()
            try:
                loss, norm = deviations(Path(name), c)
            except RanksFailed as error:
                print(error)
                loss = norm = float("inf")
            equal = loss <= LOSS and norm <= NORM
            rows.append({**c._asdict(), "loss": loss, "grad_norm": norm, "equal": equal})
            seconds = f"{time.perf_counter() - start:.0f}"
            print(
                line.format(
                    *c, f"{loss:.1e}", f"{norm:.1e}", seconds, "equal" if equal else "NOT EQUAL"
                ),
                flush=True,
            )
    equal = sum(row["equal"] for row in rows)
    print(
        f"{equal} of {len(rows)} equal: losses within {LOSS:g}, "
        f"gradient norms within {NORM:g} relative, {STEPS} steps each"
    )
    print("all pairs of values but for " + "; ".join(EXCLUDED))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
