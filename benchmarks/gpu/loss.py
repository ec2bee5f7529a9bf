"""Measures the loss beside other implementations with ``benchmarks.loss``, largest models first."""

from functools import partial
from typing import Any

from benchmarks.contenders import CROSS_ENTROPIES, Case
from benchmarks.gpu.figures import Figures, Setting, main
from benchmarks.loss import SHAPES, heading, measured, states_cases, table, times
from benchmarks.measure import FLOOR
from benchmarks.states import errors
from benchmarks.states import table as error_table

TOKENS, ROUNDS = 8192, 7
ORDER = ("llama-7b", "llama-3-8b", "qwen2.5-0.5b", "gemma-3-270m")
OURS = ("mle", "frozen", "cached", "mle-sampled", "frozen-sampled", "cached-sampled")
OTHERS = ("plain", "torch-chunked", "liger-triton", "cce", "quack")
TOY = ("plain", "cce", "chunked-frozen", "chunked-cached-sampled")
MORE = ("liger-cute", "triton-adaptive", "triton-identity", "chunked-frozen")  # with --all
STATES_TOKENS = 4096


def run(setting: Setting, figures: Figures) -> None:
    """Measures case after case, and keeps each at once."""
    names = TOY if setting.toy else (*OTHERS, *(f"triton-{kind}" for kind in OURS))
    names += MORE if setting.all and not setting.toy else ()
    for case in cases(setting):
        rounds = 1 if setting.toy else ROUNDS
        figures.attempt(case.shape, partial(add, case, names, rounds, figures))


def cases(setting: Setting) -> list[Case]:
    """Returns the shapes that count most, real hidden states if a file has them, and the others."""
    if setting.toy:
        real = states_cases([setting.states], [64], "cpu", "float32") if setting.states else []
        return [Case("toy", 16, 300, 64), *real]
    device = (TOKENS, "cuda", "bfloat16")
    found = [Case(name, *SHAPES[name], *device) for name in ORDER]
    if setting.states:
        found[2:2] = states_cases([setting.states], [STATES_TOKENS], "cuda", "bfloat16")
    if setting.all:
        found += [Case(name, *SHAPES[name], 2048, "cuda", "bfloat16") for name in ORDER]
    return found


def add(case: Case, names: tuple[str, ...], rounds: int, figures: Figures) -> None:
    """Adds a figure for each contender of a case."""
    rows = measured(case, names, 1, rounds)
    print(heading(rows[0]), table(rows), sep="\n\n", flush=True)
    seconds = times(rows)
    fastest = min(seconds[name] for name in CROSS_ENTROPIES if name in seconds)
    for row in rows:
        name = row["contender"]
        if "left_out" in row:
            figures.add(f"{case.shape} {name}", note=f"left out: {row['left_out']}", raw=row)
            continue
        note = described(row, seconds[name], fastest, seconds[FLOOR], case)
        figures.add(f"{case.shape} {name}", 1e3 * seconds[name], "ms", note, raw=row)
    if case.states:
        found = errors(case, [row["contender"] for row in rows])
        print(error_table(found), flush=True)
        figures.add(f"{case.shape} errors", raw=found)


def described(row: dict[str, Any], took: float, fastest: float, floor: float, case: Case) -> str:
    """Says how a time compares with the three products, and with the fastest cross entropy."""
    if row["contender"] == FLOOR:
        rate = 6 * case.tokens * case.hidden * case.vocab / took / 1e12
        return f"the three products alone, {rate:.0f} TFLOP/s"
    peak = f", {row['peak_extra_mib']:.0f} MiB more" if "peak_extra_mib" in row else ""
    rate = f"{100 * floor / took:.0f} % of the products' rate"
    return f"{took / fastest:.2f} of the fastest cross entropy, {rate}{peak}"


if __name__ == "__main__":
    main(run)
