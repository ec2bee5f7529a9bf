"""Markdown tables of ``train.py``."""

from pathlib import Path
from statistics import median
from typing import Any

from transformers import LlamaConfig

from benchmarks.measure import MIB
from benchmarks.train_contenders import OURS, TRL, Job
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.preflight.estimate import NO_COST, Setup, precision_of, traffic
from stanford_alpaca.preflight.model_profile import profile_model
from stanford_alpaca.preflight.plans import Machine, Row, rows_of

LLAMA_7B = Path(__file__).resolve().parents[1] / "examples" / "llama-7b"
ESTIMATED = ("ddp", "fsdp", "zero1", "zero2", "zero3")
PEERS = {
    "emo-packing": "trl-packing",
    "emo-packing-padding_free": "trl-packing",
    "emo-padding_free": "trl-padding_free",
    "emo-bf16": "trl-bf16",
    "emo-lora": "trl-lora",
    "emo-lora-sampled": "trl-lora",
}
OWN_KIND = ("trl-bf16", "trl-lora")  # comparable only with ours of the same kind


def markdown(lines: list[list[str]]) -> str:
    """Formats a table. The first line is the header."""
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    )


# ---- against TRL ---------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rates with their range over the rounds, and ours relative to TRL's.

    Ours are compared with TRL as launched by default, and with TRL under the same settings.
    """
    places = list(dict.fromkeys(place for row in rows for place in row["runs"]))
    own = places[-1]  # the launcher's allocator, or the GPU
    rates = {
        (row["contender"], place): middle(of, "tokens_per_s")
        for row in rows
        for place, of in row["runs"].items()
    }
    best = max(
        (rates[name, own] for name in TRL if name not in OWN_KIND and (name, own) in rates),
        default=None,
    )
    lines = [
        [
            "contender",
            *(f"tokens/s, {place} (min-max)" for place in places),
            "ms a step",
            "targets a step",
        ]
    ]
    lines[0] += [
        "positions a step",
        "peak MiB",
        *(f"/ trl, {place}" for place in places),
        "/ its like",
        "/ TRL's best",
    ]
    for row in rows:
        name, of = row["contender"], row["runs"].get(own) or next(iter(row["runs"].values()))
        scales = {"seconds": 1000, "targets": 1, "positions": 1}
        per_step = [scale * middle(of, entry) / of[0]["steps"] for entry, scale in scales.items()]
        peers = [
            *(rates.get(("trl", place)) for place in places),
            rates.get((PEERS.get(name, "trl"), own)),
            rates.get((PEERS[name], own)) if PEERS.get(name) in OWN_KIND else best,
        ]
        mine = rates.get((name, own)) if name in OURS else None
        ratios = ["-" if mine is None or peer is None else f"{mine / peer:.2f}" for peer in peers]
        spans = [spread(row["runs"].get(place)) for place in places]
        lines.append(
            [
                name,
                *spans,
                *(f"{value:.0f}" for value in (*per_step, middle(of, "peak_mib"))),
                *ratios,
            ]
        )
    return markdown(lines)


def middle(runs: list[dict[str, Any]], entry: str) -> float:
    return median(run[entry] for run in runs)


def spread(runs: list[dict[str, Any]] | None) -> str:
    if not runs:
        return "-"
    rates = [run["tokens_per_s"] for run in runs]
    return f"{median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


# ---- several processes ---------------------------------------------------------------------------


def scaling_row(job: Job, ranks: list[dict[str, Any]], config: LlamaConfig) -> dict[str, Any]:
    """Combines what the ranks of a job measured. Adds the bytes that the preflight predicts."""
    seconds = max(rank["seconds"] for rank in ranks)
    row = {
        "contender": job.contender,
        "engine": job.engine,
        "cost_sharding": job.cost_sharding,
        "ranks": job.ranks,
        "tokens_per_s": sum(rank["targets"] for rank in ranks) / seconds,
        "step_s": seconds / (job.steps - 1),
        "peak_mib": max(rank["peak_mib"] for rank in ranks),
    }
    if job.ranks == 1:
        return row
    counted = [rank["counted"] for rank in ranks]
    targets, unique = (
        sum(c["targets"] for c in counted),
        len({token for c in counted for token in c["unique"]}),
    )
    setup = Setup(
        ranks=job.ranks,
        batch=1,
        accumulation=1,
        length=round(targets / job.ranks),
        priced=job.contender in OURS,
        bf16=False,
        device="cpu",
        unique_share=unique / targets,
        cost_cache_mib=0,
    )
    counts = profile_model(config, 8, "float32").parameters
    received = sum(sum(c["bytes"].values()) for c in counted) / job.ranks
    return row | {
        "calls": counted[0]["calls"],
        "targets": targets,
        "unique_targets": unique,
        "bytes": received,
        "bytes_by_kind": {
            kind: sum(c["bytes"].get(kind, 0) for c in counted) / job.ranks
            for kind in counted[0]["bytes"]
        },
        "estimated_bytes": traffic(counts, setup, job.engine, job.cost_sharding),
    }


def scaling_table(rows: list[dict[str, Any]]) -> str:
    """Shows the step time and the bytes that a rank receives in a step.

    The preflight's prediction of the bytes stands beside them.
    """
    lines = [
        [
            "contender",
            "engine",
            "cost_sharding",
            "processes",
            "s a step",
            "tokens/s",
            "peak MiB a process",
            "collectives",
            "MiB received a step",
            "preflight MiB",
            "counted / preflight",
        ]
    ]
    for row in rows:
        cells = [
            row["contender"],
            row["engine"],
            row["cost_sharding"] if row["contender"] in OURS else NO_COST,
            str(row["ranks"]),
        ]
        cells += [f"{row['step_s']:.3f}", f"{row['tokens_per_s']:.0f}", f"{row['peak_mib']:.0f}"]
        if "bytes" in row:
            calls = ", ".join(f"{count} {kind}" for kind, count in sorted(row["calls"].items()))
            said = row["estimated_bytes"]
            cells += [
                calls,
                f"{row['bytes'] / MIB:.2f}",
                f"{said / MIB:.2f}",
                f"{row['bytes'] / said:.4f}",
            ]
        lines.append(cells + ["-"] * (len(lines[0]) - len(cells)))
    return markdown(lines)


def estimates(ranks: tuple[int, ...] = (8, 64, 1024), batch: int = 4, length: int = 512) -> str:
    """Estimates EMO training of LLaMA-7B.

    The bytes come from formulas that the counted bytes confirm. The seconds assume fixed rates.
    """
    config = ModelSource(str(LLAMA_7B)).config()
    profiles = {
        name: profile_model(config, length, name)
        for name in {precision_of(engine, True) for engine in ESTIMATED}
    }
    machine = Machine("A100", 80.0, 0.4, 25.0, 25.0)
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for number in ranks:
        setup = Setup(ranks=number, batch=batch, accumulation=1, length=length, priced=True)
        for row in rows_of(profiles, setup, machine, length, ESTIMATED, None):
            found.setdefault((row.engine, row.cost_sharding), {})[number] = row
    lines = [
        [
            "engine",
            "cost_sharding",
            *(f"GB received, {n}" for n in ranks),
            *(f"s a step, {n}" for n in ranks),
        ]
    ]
    for names, by_ranks in found.items():
        moved = [f"{by_ranks[n].moved / 1e9:.2f}" if n in by_ranks else "-" for n in ranks]
        times = [
            "-".join(f"{s:.2f}" for s in by_ranks[n].seconds) if n in by_ranks else "-"
            for n in ranks
        ]
        lines.append([*names, *moved, *times])
    about = (
        f"On paper: LLaMA-7B, {batch} full rows of {length} tokens a GPU and step, bfloat16, A100 "
        "at 40 % of its peak, 25 GB/s a GPU between nodes; seconds with communication hidden "
        "altogether - not at all."
    )
    return f"{about}\n\n{markdown(lines)}"
