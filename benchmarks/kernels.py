"""What the Triton kernels have to move and compute, what they compile to, and how long they take.

Run ``python -m benchmarks.kernels`` in the repository's root. No GPU is needed: the kernels are
compiled for GPUs that are not there, and their machine code is read. It writes
``benchmarks/results/kernels.md``: floors in milliseconds at the rates of data sheets, and from them
expected times. These are predictions, made before any run.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compiled import Code, compiled_code
from benchmarks.contenders import Case, make_targets
from benchmarks.loss import RESULTS, SHAPES
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_writable, command, exit_on_user_error
from stanford_alpaca.losses.backends import chunked, triton_kernels
from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.losses.types import Head
from stanford_alpaca.training.hardware import PEAK_FLOPS

TOKENS = 8192
REACHED = 0.8  # share of each floor's rate that is expected of a run
PLAIN_BYTES = 52  # of a logit, see ``plain_stages``
BLOCKS = tuple((block, warps) for block in (1024, 2048, 4096) for warps in (4, 8, 16))


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU, from its maker's data sheet."""

    name: str  # in PEAK_FLOPS, which has the rate of dense bf16 products
    capability: int
    bandwidth: float  # bytes/s
    fp32: float  # operations/s, of products in float32 without TF32
    lanes: float  # instructions/s of single threads: 128 per multiprocessor and clock

    @property
    def exps(self) -> float:  # 16 per multiprocessor and clock
        return self.lanes / 8


GPUS = (  # NVIDIA data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024), HGX B200
    Gpu("A100", 80, 2.039e12, 19.5e12, 108 * 128 * 1.41e9),
    Gpu("H100", 90, 3.35e12, 67e12, 132 * 128 * 1.98e9),
    Gpu("H200", 90, 4.8e12, 67e12, 132 * 128 * 1.98e9),
    Gpu("B200", 100, 7.7e12, 75e12, 148 * 128 * 1.965e9),
)


# ---- floors --------------------------------------------------------------------------------------


def unique_targets(vocab: int) -> int:
    """Returns how many different targets the loss benchmark's random ones have."""
    return len(make_targets(Case("", 1, vocab, TOKENS)).unique())


def our_stages(gpu: Gpu, hidden: int, vocab: int, kind: str, codes: list[Code]) -> dict[str, float]:
    """Returns the floors in seconds of the stages of our loss, mle, frozen or cached."""
    n, logits, head = TOKENS, TOKENS * vocab, hidden * vocab
    chunks = -(-n // max(16, triton_kernels.CHUNK_LOGITS["cuda"] // vocab))
    unique = unique_targets(vocab)
    costs = {"mle": 0, "frozen": 4, "cached": 2}[kind] * unique * vocab  # bytes of the rows
    passes = {}
    for code, moved in zip(codes, (2, 4), strict=True):
        passes[code.kernel] = max(
            (moved * logits + costs) / gpu.bandwidth,
            code.instructions * logits / gpu.lanes,
            code.exps * logits / gpu.exps,
        )
    # zeros, per chunk a product and its addition, the copy in bf16, the gradient that arrives
    added = (4 + 12 * chunks + 6 + 4) * head
    stages = {"products": 6 * n * head / PEAK_FLOPS[gpu.name], **passes}
    stages["sum of d weight"] = added / gpu.bandwidth
    if kind == "frozen":  # in float32: the product, its rows, the cut of noise
        stages["costs"] = max(
            2 * unique * head / gpu.fp32,
            (4 * chunks * head + 12 * unique * vocab) / gpu.bandwidth,
        )
    return stages


def plain_stages(gpu: Gpu, hidden: int, vocab: int) -> dict[str, float]:
    """Returns the floors of ``F.cross_entropy((hidden @ weight.T).float(), targets)``.

    Bytes of a logit: 6 to make it float32, 16 for log-softmax, 4 for zeros in the backward pass, 20
    for that of log-softmax, 6 to make it bfloat16.
    """
    products = 6 * TOKENS * hidden * vocab / PEAK_FLOPS[gpu.name]
    return {"products": products, "passes": PLAIN_BYTES * TOKENS * vocab / gpu.bandwidth}


class Counted(TorchDispatchMode):
    """Counts operations that launch kernels: all but views and what only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function._schema.name
        made = name in ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach")
        self.count += not (function.is_view or made)
        return function(*args, **kwargs or {})


def launches(mode: str, chunks: int) -> int:
    """Returns the operations of forward and backward with so many chunks, kernels included."""
    from tests.helpers import triton_kernels as copy_of

    module = copy_of(interpret=True)
    n, vocab = 32, 64
    module.BLOCK, module.CHUNK_LOGITS = 64, {"cuda": n * vocab // chunks}
    hidden = torch.randn(n, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=torch.bfloat16, requires_grad=True)
    targets: Tensor = torch.arange(n)
    cost = None if mode == "mle" else CostEmbedding(weight)
    with Counted() as counted:
        loss, _ = chunked.linear_loss(
            hidden, Head(weight), targets, cost, Objective(mode), "sum", kernels=module
        )
        loss.backward()
    return counted.count + 2 * chunks


# ---- the tables ----------------------------------------------------------------------------------


def markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code_table(cases: list[tuple[str, list[Code]]]) -> str:
    lines = ["for kernel registers spilled loads instructions exps warps".split()]
    for name, codes in cases:
        for code in codes:
            numbers = f"{code.instructions:.1f}", f"{code.exps:.1f}", str(code.resident)
            loads = f"{code.wide} of {code.loads}"
            bytes_spilled = str(code.spilled)
            lines.append([name, code.kernel, str(code.registers), bytes_spilled, loads, *numbers])
    return markdown(lines)


def stage_table(gpu: Gpu, codes: dict[str, list[Code]]) -> str:
    lines = [["shape", "", "products", "statistics", "gradient", "sum of d weight", "costs"]]
    for shape, (hidden, vocab) in shapes():
        for kind, own in codes.items():
            stages = our_stages(gpu, hidden, vocab, kind, own)
            cells = [f"{1e3 * stages[n]:.2f}" if n in stages else "-" for n in lines[0][2:]]
            lines.append([shape, kind, *cells])
    return markdown(lines)


def expected_table(codes: dict[int, dict[str, list[Code]]]) -> str:
    lines = ["GPU shape plain mle frozen cached frozen/plain cached/plain".split()]
    for gpu in GPUS:
        for shape, (hidden, vocab) in shapes():
            plain = expected(plain_stages(gpu, hidden, vocab))
            ours = {
                kind: expected(our_stages(gpu, hidden, vocab, kind, own))
                for kind, own in codes[gpu.capability].items()
            }
            times = [f"{each:.1f}" for each in (plain, *ours.values())]
            ratios = [f"{ours[kind] / plain:.2f}" for kind in ("frozen", "cached")]
            lines.append([gpu.name, shape, *times, *ratios])
    return markdown(lines)


def expected(stages: dict[str, float]) -> float:  # ms
    return 1e3 * sum(stages.values()) / REACHED


def shapes() -> list[tuple[str, tuple[int, int]]]:
    return [(name, shape) for name, shape in SHAPES.items() if name != "cpu"]


def report() -> str:
    """Returns the whole page."""
    default = triton_kernels.BLOCK, triton_kernels.WARPS
    kinds = {"mle": "", "frozen": "float32", "cached": "bfloat16"}
    codes = {
        capability: {kind: compiled_code(capability, *default, costs=kinds[kind]) for kind in kinds}
        for capability in sorted({gpu.capability for gpu in GPUS})
    }
    compiled = [(f"sm_{c}, {kind}", own) for c, each in codes.items() for kind, own in each.items()]
    odd = compiled_code(90, *default, vocab=65)
    space = [(f"{b} logits, {w} warps", compiled_code(90, b, w)) for b, w in BLOCKS]
    few, more = ([launches(mode, chunks) for mode in ("mle", "emo")] for chunks in (1, 2))
    rates = [["GPU", "bf16 TFLOP/s", "float32 TFLOP/s", "TB/s"]]
    for gpu in GPUS:
        speeds = PEAK_FLOPS[gpu.name] / 1e12, gpu.fp32 / 1e12, gpu.bandwidth / 1e12
        rates.append([gpu.name, *(f"{each:g}" for each in speeds)])
    page = (Path(__file__).parent / "kernels.txt").read_text()
    return page.format(
        rates=markdown(rates),
        compiled=code_table([*compiled, ("sm_90, frozen, odd V", odd)]),
        space=code_table(space),
        stages=stage_table(GPUS[2], codes[90]),
        expected=expected_table(codes),
        reached=REACHED,
        mle=few[0],
        mle_chunk=more[0] - few[0],
        emo=few[1],
        emo_chunk=more[1] - few[1],
    )


@dataclass(frozen=True)
class Options:
    """Compiles, counts, and writes kernels.md.

    Args:
        results: the folder of the page.
    """

    results: str = RESULTS


def write(options: Options) -> None:
    """Writes the page and prints it."""
    if triton_kernels.triton is None:
        raise UserError("triton is not installed: pip install triton")
    check_writable("results", Path(options.results))
    page = report()
    Path(options.results).mkdir(parents=True, exist_ok=True)
    (Path(options.results) / "kernels.md").write_text(page)
    print(page)


run = command(Options, write)

if __name__ == "__main__":
    exit_on_user_error(partial(fire.Fire, run))
