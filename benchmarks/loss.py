"""Compares the time and memory of the loss with other implementations.

Run ``python -m benchmarks.loss`` in the repository's root. It uses the GPU if there is one. Forward
and backward of every contender of ``contenders.py`` take turns in one run. Tables are printed; JSON
and a plot go to ``benchmarks/results``. ``python -m benchmarks.loss scaling`` measures how the time
grows with the tokens and with the vocabulary.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import fire
from fire.decorators import SetParseFns

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

import torch

from benchmarks import plots
from benchmarks.contenders import CONTENDERS, CROSS_ENTROPIES, OURS, Case, make_targets, versions
from benchmarks.measure import ALLOCATOR, FLOOR, Setup, measure
from benchmarks.states import errors, read_shape
from benchmarks.states import table as error_table
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import IGNORE_INDEX, tokenize_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import (
    check_whole,
    check_writable,
    command,
    exit_on_user_error,
    refuse_unknown,
)
from stanford_alpaca.models.load import ModelSource

# (H, V): hidden size and vocabulary size
SHAPES = {
    "cpu": (512, 32000),
    "llama-7b": (4096, 32000),
    "llama-3-8b": (4096, 128256),
    "qwen2.5-0.5b": (896, 151936),
    "gemma-3-270m": (640, 262144),
}
SHIPPED = ROOT / "data" / "instructions" / "train.json"
SCALED = (
    "plain",
    "chunked-mle",
    "chunked-frozen",
    "chunked-cached",
    "triton-mle",
    "triton-frozen",
    "triton-cached",
)
RESULTS = str(ROOT / "benchmarks" / "results")


@dataclass(frozen=True)
class Options:
    """Prints a table per shape and count of tokens, and writes JSON and a plot.

    The files are loss-DEVICE.jsonl and .png. New rows replace those of the same case.

    Args:
        shape: any of cpu, llama-7b, llama-3-8b, qwen2.5-0.5b and gemma-3-270m, with commas. The
            default is cpu, or the others on a GPU.
        tokens: counts of tokens, with commas.
        hidden, vocab: a custom shape.
        rounds: measured rounds, after a warm-up.
        only: contenders, with commas.
        ids_from: a JSON file of records. Their responses give one more case, in the tokenizer's own
            vocabulary. "none" leaves it out.
        tokenizer: the tokenizer of those responses.
        device: cpu or cuda.
        dtype: float32 (default on a CPU), bfloat16 (default on a GPU) or float16.
        threads: threads on a CPU.
        results: the folder for JSON and plot.
        states: files of ``benchmarks.states``, with commas: hidden states, targets and output layer
            of real models take the place of random ones. A table of errors follows each.
        frozen_head: only the hidden states get a gradient, as with LoRA.
    """

    shape: str | None = None
    tokens: Any = (2048, 8192)
    hidden: int | None = None
    vocab: int | None = None
    rounds: int = 7
    only: str | None = None
    ids_from: str = str(SHIPPED)
    tokenizer: str = str(ROOT / "data" / "tiny-base")
    device: str | None = None
    dtype: str | None = None
    threads: int = os.cpu_count() or 1
    results: str = RESULTS
    states: str | None = None
    frozen_head: bool = False


def compare(options: Options) -> None:
    """Measures every case, keeps its rows, prints its tables, and draws the plot."""
    counts = [("tokens", count) for count in as_list(options.tokens)]
    sizes = [("hidden", options.hidden), ("vocab", options.vocab), *counts]
    check_flags(options.results, options.device, sizes, options.rounds, options.threads)
    device, names = options.device or default_device(), contenders(options.only)
    file = Path(options.results) / f"loss-{device_name(device)}.jsonl"
    for case in cases_of(options, device):
        rows = measured(case, names, options.threads, options.rounds)
        found = errors(case, [row["contender"] for row in rows]) if case.states else {}
        if case.states:
            rows = [row | {"errors": found.get(row["contender"])} for row in rows]
        keep(file, rows)
        print(heading(rows[0]), table(rows), sep="\n\n", end="\n\n", flush=True)
        for row in rows:
            if "left_out" in row:
                print(f"left out: {row['contender']}: {row['left_out']}")
        if case.states:
            print(error_table(found), end="\n\n", flush=True)
    draw(plots.bars, read(file), file)


run = command(Options, compare)


def cases_of(options: Options, device: str) -> list[Case]:
    """Returns what is measured. Raises UserError for flags that name no case."""
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose from float32, bfloat16, float16")
    counts = as_list(options.tokens)
    if options.states is not None:
        cases = states_cases(options.states.split(","), counts, device, dtype)
    else:
        shapes = named_shapes(options.shape, options.hidden, options.vocab, device)
        cases = [Case(each, *shapes[each], n, device, dtype) for each in shapes for n in counts]
    if options.states is None and options.ids_from != "none":
        ids, size = response_ids(options.ids_from, options.tokenizer, counts[0])
        named = Path(options.ids_from).name
        cases.append(Case("real ids", cases[0].hidden, size, counts[0], device, dtype, named, ids))
    return [replace(case, frozen_head=options.frozen_head) for case in cases]


def states_cases(files: list[str], counts: list[int], device: str, dtype: str) -> list[Case]:
    """Returns a case for each file and count. Raises UserError for a file with too few tokens."""
    cases = []
    for file in files:
        found, hidden, vocab = read_shape(file)
        for count in counts:
            if count > found:
                raise UserError(f"--states {file}: it has {found} tokens, wanted {count}")
            name = Path(file).stem
            cases.append(Case(name, hidden, vocab, count, device, dtype, "its own data", (), file))
    return cases


@SetParseFns(results=str)
def scaling(
    tokens: Any = (512, 1024, 2048, 4096, 8192),
    vocabularies: Any = (32000, 64000, 128256, 151936),
    hidden: int = 256,
    rounds: int = 7,
    device: str | None = None,
    threads: int = os.cpu_count() or 1,
    results: str = RESULTS,
    **unknown: Any,
) -> None:
    """Measures the time per token and vocabulary entry.

    One series varies --tokens at the smallest vocabulary. The other varies --vocabularies at the
    middle of --tokens. Writes loss-scaling-DEVICE.jsonl and .png.
    """
    refuse_unknown(unknown, scaling)
    counts = [("tokens", count) for count in as_list(tokens)] + [
        ("vocabularies", size) for size in as_list(vocabularies)
    ]
    check_flags(results, device, [("hidden", hidden), *counts], rounds, threads)
    device = device or default_device()
    dtype = "float32" if device == "cpu" else "bfloat16"
    sizes, middle = (
        sorted(as_list(vocabularies)),
        sorted(as_list(tokens))[len(as_list(tokens)) // 2],
    )
    cases = [Case("tokens", hidden, sizes[0], count, device, dtype) for count in as_list(tokens)]
    cases += [Case("vocabulary", hidden, size, middle, device, dtype) for size in sizes]
    file = Path(results) / f"loss-scaling-{device_name(device)}.jsonl"
    for case in cases:
        rows = measured(case, SCALED, threads, rounds)
        keep(file, rows)
        costs = {name: 1e9 * time / case.tokens / case.vocab for name, time in times(rows).items()}
        shown = ", ".join(f"{name} {cost:.3f}" for name, cost in costs.items())
        print(
            f"N={case.tokens} V={case.vocab} H={case.hidden}, ns per token and entry: {shown}",
            flush=True,
        )
    draw(plots.curves, [row for row in read(file) if row["case"]["hidden"] == hidden], file)


# ---- what is measured ----------------------------------------------------------------------------


def check_flags(
    results: str, device: str | None, sizes: list[tuple[str, Any]], rounds: Any, threads: Any
) -> None:
    """Raises UserError before anything is measured."""
    for name, value in [*sizes, ("rounds", rounds), ("threads", threads)]:
        if value is not None:
            check_whole(name, value, 1)
    if device not in (None, "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: choose cpu, or cuda where there is a GPU")
    if Path(results).exists() and not Path(results).is_dir():
        raise UserError(f"--results {results} is a file; give a folder")
    check_writable("results", Path(results))


def as_list(value: Any) -> list:
    """Returns one value or several. ``command`` makes texts of several numbers."""
    values = value if isinstance(value, tuple | list) else [value]
    return [int(each) if isinstance(each, str) and each.isdecimal() else each for each in values]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")


def contenders(only: str | None) -> tuple[str, ...]:
    names = tuple(CONTENDERS) if only is None else tuple(only.split(","))
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--only {name}: choose from {', '.join(CONTENDERS)}")
    return names


def named_shapes(
    shape: str | None, hidden: int | None, vocab: int | None, device: str
) -> dict[str, tuple[int, int]]:
    if hidden is not None and vocab is not None and shape is None:
        return {"own": (hidden, vocab)}
    if hidden is not None or vocab is not None:
        raise UserError("give --hidden and --vocab together, or --shape")
    names = (
        [name for name in SHAPES if (name == "cpu") == (device == "cpu")]
        if shape is None
        else shape.split(",")
    )
    for name in names:
        if name not in SHAPES:
            raise UserError(
                f"--shape {name}: choose from {', '.join(SHAPES)}, or give --hidden and --vocab"
            )
    return {name: SHAPES[name] for name in names}


def response_ids(file: str, tokenizer_path: str, count: int) -> tuple[tuple[int, ...], int]:
    """Returns the first ``count`` supervised token ids of a file, and the vocabulary size."""
    tokenizer = ModelSource(tokenizer_path).tokenizer()
    examples, _ = tokenize_records(load_records(file), tokenizer, 512)
    ids = [label for labels in examples["labels"] for label in labels if label != IGNORE_INDEX]
    if len(ids) < count:
        raise UserError(
            f"--ids_from {file}: its responses have {len(ids)} tokens, wanted {count}: give a "
            "larger file"
        )
    return tuple(ids[:count]), len(tokenizer)


def measured(case: Case, names: Iterable[str], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Runs ``measure`` and adds the machine and the case to every row."""
    left_out = ("ids", "states") if case.frozen_head else ("ids", "states", "frozen_head")
    described = {name: value for name, value in asdict(case).items() if name not in left_out}
    described["unique_targets"] = round(len(make_targets(case).unique()) / case.tokens, 4)
    about = {"machine": machine(case.device, threads), "case": described}
    return [about | row for row in measure(Setup(case, tuple(names), threads), rounds)]


def machine(device: str, threads: int) -> dict[str, Any]:
    """Describes the machine without anything that identifies it."""
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
        waiting = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        settings = {"threads": threads, "allocator": ALLOCATOR, **waiting}
        return {"model": model, "cores": os.cpu_count(), **settings, "versions": versions()}
    return {
        "model": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


# ---- files ---------------------------------------------------------------------------------------


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of a case in place of the file's earlier ones of the same case."""
    file.parent.mkdir(parents=True, exist_ok=True)
    others = [row for row in read(file) if row["case"] != rows[0]["case"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in others + rows))


def draw(
    plot: Callable[[list[dict[str, Any]], Path], None], rows: list[dict[str, Any]], file: Path
) -> None:
    try:
        plot(rows, file.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}: pip install matplotlib")


# ---- tables --------------------------------------------------------------------------------------


def times(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the median seconds of each contender.

    Ours count under the launcher's allocator. Others count under whichever allocator is faster for
    them.
    """
    found = {}
    for row in rows:
        if "seconds" in row:
            medians = {name: median(values) for name, values in row["seconds"].items()}
            best = min(medians.values())
            found[row["contender"]] = (
                medians.get("launcher", best) if row["contender"] in OURS else best
            )
    return found


def heading(row: dict[str, Any]) -> str:
    case, about = row["case"], row["machine"]
    where = (
        f"{about['model']}, {about['threads']} threads" if "threads" in about else about["model"]
    )
    targets = (
        "Zipf-distributed targets"
        if case["targets"] == "zipf"
        else f"targets of {case['targets']} in their own vocabulary"
    )
    frozen = ", frozen head" if "frozen_head" in case else ""
    return (
        f"## {case['shape']}: N={case['tokens']} H={case['hidden']} V={case['vocab']} "
        f"{case['dtype']}{frozen}, {targets}, {100 * case['unique_targets']:.1f} % unique; {where}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table: one line per contender that ran, the floor first."""
    ran, seconds = [row for row in rows if "seconds" in row], times(rows)
    fastest = min((seconds[name] for name in CROSS_ENTROPIES if name in seconds), default=None)
    against = {name: seconds.get(name) for name in ("plain", "torch-chunked", "emoloss")} | {
        "fastest": fastest
    }
    environments = list(ran[0]["seconds"])
    lines = [
        [
            "contender",
            *(f"s, {name} (min-max)" for name in environments),
            "peak extra MiB",
            "of it tensors",
            "kept MiB",
            *(f"/ {name}" for name in against),
            "share of floor",
        ]
    ]
    lines.append(["---"] * len(lines[0]))
    for row in ran:
        name = row["contender"]
        spans = [
            f"{median(values):.4f} ({min(values):.4f}-{max(values):.4f})"
            for values in row["seconds"].values()
        ]
        memory = [
            f"{row[entry]:.0f}" if entry in row else "-"
            for entry in ("peak_extra_mib", "peak_tensors_mib", "kept_mib")
        ]
        ratios = [
            "-" if base is None else f"{seconds[name] / base:.2f}" for base in against.values()
        ]
        lines.append(
            [name, *spans, *memory, *ratios, f"{100 * seconds[FLOOR] / seconds[name]:.0f} %"]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Runs the command."""
    scales = sys.argv[1:2] == ["scaling"]
    called, arguments = (scaling, sys.argv[2:]) if scales else (run, sys.argv[1:])
    exit_on_user_error(lambda: fire.Fire(called, command=arguments))


if __name__ == "__main__":
    main()
