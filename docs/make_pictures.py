"""Draws the pictures of these pages: ``python docs/make_pictures.py RUN [RUN ...]``.

A RUN is an output folder of training. The pictures are the layers of the package, the curves of the
runs, and what the runs' models expect in place of one token. The report's screenshots are made by
``python -m tests.evaluation.screenshots REPORT docs``.
"""

import json
import sys
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stanford_alpaca.cost import CostEmbedding  # noqa: E402
from stanford_alpaca.data.tokenize import PromptEncoder  # noqa: E402
from stanford_alpaca.models.load import ModelSource  # noqa: E402

BASE = ROOT / "data" / "tiny-base"
RECORD = {"instruction": "What is another word for big?", "input": "", "output": ""}
TARGET = "Another"  # the first token of the reference, in whose place the models are asked
SHOWN = 8  # tokens of a model


def layers(file: Path) -> None:
    """Draws the contract of import-linter: a box for each layer, the highest at the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    names = next(each["layers"] for each in contracts["contracts"] if each["type"] == "layers")
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(names)))
    for number, name in enumerate(reversed(names)):
        parts = name.split(" | ")
        for place, part in enumerate(parts):
            width = 1 / len(parts)
            left = place * width + 0.005
            axes.barh(
                number, width - 0.01, left=left, height=0.8, color="#dce6f5", edgecolor="#36c"
            )
            axes.text(left + width / 2 - 0.005, number, part, ha="center", va="center", fontsize=9)
    axes.set_axis_off()
    figure.savefig(file, dpi=150, bbox_inches="tight")


def curves(runs: list[Path], file: Path) -> None:
    """Draws nll and emo over the steps of each run."""
    figure, pair = plt.subplots(1, 2, figsize=(9, 3))
    for run in runs:
        log = json.loads((run / "trainer_state.json").read_text())["log_history"]
        for axes, measure in zip(pair, ("nll", "emo"), strict=True):
            points = [(entry["step"], entry[measure]) for entry in log if measure in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=run.name)
            axes.set(xlabel="step", ylabel=measure, yscale="log")
    pair[0].legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")


@torch.no_grad()
def mass(runs: list[Path], file: Path) -> None:
    """Draws, for each model, its likeliest tokens in one place, and what each of them costs."""
    models = [BASE, *runs]
    base = ModelSource(str(BASE)).load()
    cost = CostEmbedding(base.get_output_embeddings().weight)
    figure, row = plt.subplots(
        1, len(models), figsize=(4.4 * len(models), 3), sharex=True, layout="constrained"
    )
    for axes, folder in zip(row, models, strict=True):
        source = ModelSource(str(folder))
        tokenizer = source.tokenizer()
        (prompt,) = PromptEncoder(tokenizer)([RECORD])
        (target,) = tokenizer(TARGET, add_special_tokens=False)["input_ids"][:1]
        probs = source.load()(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        prices = cost.costs(torch.tensor([target]), len(probs))[0]
        top, ids = probs.topk(SHOWN)
        colors = plt.cm.viridis_r(prices[ids].clamp(0, 1).numpy())
        axes.barh(range(SHOWN), top.flip(0), color=colors[::-1])
        axes.set_yticks(range(SHOWN), [tokenizer.decode(i) for i in ids.flip(0)])
        axes.set(title=f"{folder.name}: expected cost {float(probs @ prices):.3f}", xlabel="p")
    figure.savefig(file, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    layers(ROOT / "docs" / "layers.png")
    if folders:
        curves(folders, ROOT / "docs" / "curves.png")
        mass(folders, ROOT / "docs" / "mass.png")
