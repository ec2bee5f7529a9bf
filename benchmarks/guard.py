"""Times the search for NaN and Inf at every step.

Run ``python -m benchmarks.guard`` in the repository's root. It runs whole optimizer steps of EMO
(forward, backward, clipping, AdamW) on a Llama with random weights and random tokens, with
``training.guard.Guard`` before the update and without it. It uses float32 on a CPU and bfloat16 on
a GPU. The two take turns, and medians are printed.
"""

from statistics import median
from time import perf_counter
from typing import Any

import fire
import torch
from transformers import PreTrainedModel

from benchmarks.packing import make_model
from stanford_alpaca.distributed.shards import Shards
from stanford_alpaca.flags import check_whole, exit_on_user_error, refuse_unknown
from stanford_alpaca.objective.attach import attach_objective
from stanford_alpaca.training.guard import Guard


def run(
    layers: int = 4,
    hidden_size: int = 512,
    vocab_size: int = 32_000,
    batch: int = 4,
    length: int = 256,
    rounds: int = 20,
    **unknown: Any,
) -> None:
    """Prints the seconds of a step with and without the guard, and their ratio.

    Args:
        layers, hidden_size, vocab_size: shape of the model.
        batch: examples of a step.
        length: tokens of an example, all of them targets.
        rounds: steps of each kind.
    """
    refuse_unknown(unknown, run)
    for name, value in [
        ("layers", layers),
        ("batch", batch),
        ("length", length),
        ("rounds", rounds),
    ]:
        check_whole(name, value, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(layers, hidden_size, vocab_size, "sdpa")
    attach_objective(model, "emo")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    guard = Guard(device, world_size=1)
    guard.start(Shards(model), {})
    ids = torch.randint(vocab_size, (batch, length), device=device)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for index in range(rounds + 1):
        for name, times in seconds.items():
            took = step(model, optimizer, ids, guard if name == "with" else None)
            if index:  # the first round warms up
                times.append(took)
    plain, guarded = median(seconds["without"]), median(seconds["with"])
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{parameters:.0f}M parameters, {batch * length} targets a step, on {device.type}")
    print(
        f"without: {1e3 * plain:.1f} ms a step; with: {1e3 * guarded:.1f} ms, "
        f"{guarded / plain:.4f}x"
    )


def step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, guard: Guard | None
) -> float:
    """Runs one step and returns its seconds, until the device has finished."""
    start = perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if guard is not None:
        guard.begin()
        guard.watch(loss)
        assert guard.may_update(1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
