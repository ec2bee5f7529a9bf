"""Times both kernels alone over the space of ``benchmarks.kernels``: what an autotuner would do."""

import time
from collections.abc import Callable

import torch

from benchmarks.gpu.figures import Figures, Setting, main
from benchmarks.kernels import BLOCKS
from stanford_alpaca.cost import CostRows
from stanford_alpaca.losses.backends import triton_kernels
from stanford_alpaca.losses.types import Head

CASES = ((8192, 32_000), (2048, 128_256))  # tokens and vocabulary of a chunk
ROUNDS = 20


def run(setting: Setting, figures: Figures) -> None:
    """Adds the bytes per second of each kernel at each size of blocks."""
    cases = ((2, 256),) if setting.toy else CASES
    for n, vocab in cases:
        for block, warps in ((64, 4),) if setting.toy else BLOCKS:
            what = f"{n} tokens, V {vocab}, {block} logits, {warps} warps"
            size = (n, vocab, block, warps)
            figures.attempt(what, lambda what=what, size=size: add(what, size, setting, figures))


def add(what: str, size: tuple[int, int, int, int], setting: Setting, figures: Figures) -> None:
    n, vocab, triton_kernels.BLOCK, triton_kernels.WARPS = size
    device = setting.device
    product = torch.randn(n, vocab, device=device).bfloat16()
    targets = torch.randint(vocab, (n,), device=device)
    table = torch.rand(n // 2, vocab, device=device).bfloat16()
    costs = CostRows(table, torch.arange(n, device=device) // 2)
    chunk = triton_kernels.Chunk(product, Head(None), targets, costs)
    _, others, log_w = chunk.statistics()
    ones = torch.ones(n, device=device)
    moved = {"statistics": 3 * n * vocab, "gradient": 5 * n * vocab}  # half a cost row a token
    calls: dict[str, Callable[[], object]] = {
        "statistics": chunk.statistics,
        "gradient": lambda: chunk.gradient(others, log_w, ones, ones, ones),
    }
    for name, call in calls.items():
        seconds = timed(call, 1 if setting.toy else ROUNDS, setting.toy)
        note = f"{1e3 * seconds:.3f} ms"
        figures.add(f"{name}, {what}", moved[name] / seconds / 1e12, "TB/s", note)


def timed(call: Callable[[], object], rounds: int, toy: bool) -> float:
    """Returns the seconds of a call."""

    def wait() -> None:
        if not toy:
            torch.cuda.synchronize()

    call()
    wait()
    began = time.perf_counter()
    for _ in range(rounds):
        call()
    wait()
    return (time.perf_counter() - began) / rounds


if __name__ == "__main__":
    main(run)
