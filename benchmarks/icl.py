"""Times few-shot scoring against a plain loop.

Run ``python -m benchmarks.icl --data_dir DIR`` in the repository's root. It measures prompts per
second, where a prompt is one class of one test item. ``scoring.score`` includes its search for the
fastest way. ``scoring.plain`` runs the model on one prompt at a time. Both get the same token ids.
They run on the shipped base model, and on a Llama with random weights and a vocabulary of 32,000.
The two take turns, and the ratio is the median over the rounds.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import fire
import torch
from transformers import PreTrainedModel

from benchmarks.packing import make_model
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.predict import FewShotSettings, choose_examples
from stanford_alpaca.evaluation.fewshot.prompting import Choices, encode_choices
from stanford_alpaca.evaluation.fewshot.retrieval import tfidf
from stanford_alpaca.evaluation.fewshot.scoring import Scores, plain, score
from stanford_alpaca.evaluation.fewshot.tasks import choose_tasks, load_task, read_tasks
from stanford_alpaca.flags import check_whole, command, exit_on_user_error
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.models.load import ModelSource


@dataclass(frozen=True)
class Options:
    """Prints a line per model and task.

    Args:
        data_dir, tasks, limit, shots, batch_size: as in icl.py.
        retriever: tfidf, random or fixed.
        model: the first model. Both use its tokenizer.
        layers, hidden_size: shape of the random model.
        rounds: measured runs of each way, after one to warm up.
    """

    data_dir: str | None = None
    tasks: str | None = None
    model: str = "data/tiny-base"
    limit: int = 64
    shots: int = 8
    retriever: str = "tfidf"
    layers: int = 4
    hidden_size: int = 256
    batch_size: int | None = None
    rounds: int = 5


def compare_models(options: Options) -> None:
    """Times both ways with each model and task."""
    if options.data_dir is None:
        raise UserError("give --data_dir DIR")
    for name in ("limit", "rounds", "layers"):
        check_whole(name, getattr(options, name), 1)
    folder = Path(options.data_dir)
    settings = FewShotSettings(options.shots, options.retriever, None, [0], "likelihood")
    shipped, tokenizer = load_for_generation(ModelSource(options.model))
    drawn = make_model(options.layers, options.hidden_size, 32_000, "sdpa").eval()
    models = {
        options.model: shipped,
        f"random, {options.layers} x {options.hidden_size}": drawn.to(shipped.device),
    }
    print(f"{torch.get_num_threads()} threads, {options.shots} examples ({options.retriever})")
    for task in choose_tasks(options.tasks, read_tasks(), folder):
        data = load_task(task, folder, options.limit)
        examples = choose_examples(data, settings, tfidf)[0]  # of seed 0
        for name, model in models.items():
            positions = model.config.max_position_embeddings
            choices = encode_choices(tokenizer, data, examples, positions)
            found = compare(model, choices, options.batch_size, options.rounds)
            print(f"{name}, {task.name}: {found}", flush=True)


run = command(Options, compare_models)


def compare(
    model: PreTrainedModel, choices: list[Choices], batch_size: int | None, rounds: int
) -> str:
    """Runs both ways in turn and reports rates, ratio and how far their scores are apart."""
    prompts = sum(len(item.endings) for item in choices)
    tokens = (
        sum(len(item.context) + len(ending) for item in choices for ending in item.endings)
        / prompts
    )
    seconds: dict[str, list[float]] = {"plain": [], "fast": []}
    for number in range(rounds + 1):
        took, slow = timed(lambda: plain(model, choices))
        seconds["plain"].append(took)
        took, fast = timed(lambda: score(model, choices, batch_size))
        seconds["fast"].append(took)
        if number == 0:  # the first round only warms up
            seconds = {way: [] for way in seconds}
    apart = max(
        abs(a - b) for pair in zip(slow, fast, strict=True) for a, b in zip(*pair, strict=True)
    )
    rates = {way: prompts / median(times) for way, times in seconds.items()}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return (
        f"{prompts} prompts of {tokens:.0f} tokens; plain {rates['plain']:.1f} prompts/s, fast "
        f"{rates['fast']:.1f}, ratio {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}); "
        f"scores within {apart:.1e}"
    )


def timed(call: Any) -> tuple[float, Scores]:
    """Returns the seconds and the scores."""
    began = perf_counter()
    scores = call()  # scores are Python numbers, so a GPU has finished
    return perf_counter() - began, scores


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
