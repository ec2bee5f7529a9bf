"""Times the loss with a frozen output layer (LoRA) against a trained one.

Run ``python -m benchmarks.frozen`` in the repository's root. It runs forward and backward of EMO
from random hidden states in two ways: with a trained output layer and a copied cost, and with a
frozen output layer that is its own cost. The two take turns, and medians are printed.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import fire
import torch
from torch import Tensor

from stanford_alpaca.cost import CostAlias, CostEmbedding
from stanford_alpaca.flags import check_whole, exit_on_user_error, refuse_unknown
from stanford_alpaca.losses import linear_emo_loss


def run(
    tokens: int = 2048,
    hidden_size: int = 512,
    vocab_size: int = 32_000,
    rounds: int = 10,
    **unknown: Any,
) -> None:
    """Prints the seconds of both, their ratio, and the MiB that each keeps for the costs.

    Args:
        tokens: targets of a call.
        hidden_size, vocab_size: shape of the output layer.
        rounds: calls of each kind.
    """
    refuse_unknown(unknown, run)
    for name, value in [
        ("tokens", tokens),
        ("hidden_size", hidden_size),
        ("vocab_size", vocab_size),
        ("rounds", rounds),
    ]:
        check_whole(name, value, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device)
    weight = torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5
    # every id is repeated once, so that only about half of the targets are unique
    targets = torch.randint(vocab_size, (tokens // 2,), device=device).repeat(2)
    trained, frozen = weight.clone().requires_grad_(), weight
    calls: dict[str, tuple[Tensor, CostEmbedding]] = {
        "trained": (trained, CostEmbedding(trained)),
        "frozen": (frozen, CostAlias(lambda: frozen)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, (head, cost) in calls.items():
            loss = partial(linear_emo_loss, hidden.requires_grad_(), head, targets, cost)
            took = timed(lambda loss=loss: loss().backward(), device)
            if index:  # the first round warms up
                seconds[name].append(took)
    ratio = median(b / a for a, b in zip(seconds["trained"], seconds["frozen"], strict=True))
    shape = f"{tokens} targets, {hidden_size} wide, vocabulary {vocab_size:,}"
    print(f"{shape}, on {device.type}, {torch.get_num_threads()} thread(s)")
    for name, (_, cost) in calls.items():
        kept = 4 * vocab_size * (1 if isinstance(cost, CostAlias) else hidden_size) / 2**20
        print(f"{name}: {1e3 * median(seconds[name]):.0f} ms, {kept:.1f} MiB kept for the costs")
    print(f"frozen / trained: {ratio:.2f}")


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Returns the seconds until the device has finished the call."""
    start = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(run))
