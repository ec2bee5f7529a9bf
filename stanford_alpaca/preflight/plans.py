"""Compares engines and cost shardings, and recommends one."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from stanford_alpaca.preflight import estimate
from stanford_alpaca.preflight.estimate import Memory, Setup, precision_of, shardings_of
from stanford_alpaca.preflight.model_profile import ModelProfile, Parameters
from stanford_alpaca.training.cost_sharding import PLACES
from stanford_alpaca.training.hardware import PEAK_FLOPS

GIB = 2**30
NEARLY = 1.2  # the assumed rates are too rough to tell apart times within this factor
USABLE = 0.92  # share of a GPU's memory; the rest is for CUDA, NCCL and the allocator's gaps


@dataclass(frozen=True)
class Machine:
    """The ranks' devices and their assumed rates."""

    gpu: str
    gpu_gib: float
    mfu: float
    link_gb_s: float  # per rank, within a node; with several nodes, the slower rate between them
    host_gb_s: float

    @property
    def usable(self) -> float:
        return USABLE * self.gpu_gib * GIB

    def seconds(self, flops: float, moved: float, through_host: float) -> tuple[float, float]:
        """Returns the shortest and the longest time of a step.

        In the shortest, communication hides behind computation altogether. In the longest, it does
        not hide at all.
        """
        compute = flops / (PEAK_FLOPS[self.gpu] * self.mfu)
        transfer = moved / (self.link_gb_s * 1e9) + through_host / (self.host_gb_s * 1e9)
        return max(compute, transfer), compute + transfer


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    engine: str
    cost_sharding: str
    memory: Memory
    fits: bool
    largest_batch: int  # per device, of those that divide the global batch; 0 if none fits
    moved: float  # bytes per step that a rank receives
    seconds: tuple[float, float]  # of a step
    host: float  # bytes of all hosts' memory, under offloading


def rows_of(
    profiles: dict[str, ModelProfile],
    setup: Setup,
    machine: Machine,
    mean_tokens: float,
    engines: Iterable[str],
    sharding: str | None,
) -> list[Row]:
    """Returns the table: every engine with every cost sharding it allows, or those asked for."""
    rows = []
    for engine in engines:
        profile = profiles[precision_of(engine, setup.bf16)]
        counts = profile.parameters
        flops, through_host = (
            estimate.compute_flops(profile, setup, mean_tokens),
            estimate.host_traffic(counts, setup, engine),
        )
        for cost in shardings_of(engine, setup, counts):
            if sharding not in (None, cost):
                continue
            totals = {
                tried.batch: estimate.peak_memory(profile, tried, engine, cost).total
                for tried in batches_of(setup)
            }
            fitting = [batch for batch, total in totals.items() if total <= machine.usable]
            moved = estimate.traffic(counts, setup, engine, cost)
            row = Row(
                engine=engine,
                cost_sharding=cost,
                memory=estimate.peak_memory(profile, setup, engine, cost),
                fits=setup.batch in fitting,
                largest_batch=max(fitting, default=0),
                moved=moved,
                seconds=machine.seconds(flops, moved, through_host),
                host=estimate.host_memory(counts.total, setup, engine),
            )
            rows.append(row)
    return rows


def batches_of(setup: Setup) -> list[Setup]:
    """Returns the same step in micro-batches of every size that divides its rows per rank."""
    rows = setup.batch * setup.accumulation
    return [
        replace(setup, batch=size, accumulation=rows // size)
        for size in range(1, rows + 1)
        if rows % size == 0
    ]


def recommend(rows: list[Row]) -> Row | None:
    """Returns the simplest row that fits and is nearly as fast as the fastest row that fits.

    The rows have to be in the order of simplicity.
    """
    fitting = [row for row in rows if row.fits]
    least = min((row.seconds[1] for row in fitting), default=0.0)
    return next((row for row in fitting if row.seconds[1] <= NEARLY * least), None)


def advise(table: Callable[[Setup], list[Row]], setup: Setup) -> str:
    """Returns what to run.

    If nothing fits, it tries activation checkpointing, then smaller batches, then more ranks.
    """
    smaller = [
        replace(tried, checkpointing=True)
        for tried in reversed(batches_of(setup))
        if tried.batch < setup.batch
    ]
    for tried in (setup, replace(setup, checkpointing=True), *smaller):
        row = recommend(table(tried))
        if row is not None:
            return launch_flags(row, tried, setup)
    none = (
        f"nothing fits on {setup.ranks} rank(s), even with --activation_checkpointing "
        "and one row at a time"
    )
    for ranks in (setup.ranks * 2**power for power in range(1, 11)):
        row = recommend(
            table(replace(setup, batch=1, accumulation=1, checkpointing=True, ranks=ranks))
        )
        if row is not None:
            return f"{none}; {row.engine} would on {ranks}"
    return f"{none}, nor on more: take GPUs with more memory"


def launch_flags(row: Row, tried: Setup, asked: Setup) -> str:
    """Returns the flags that launch a row, and the reason for it."""
    flags = f"ENGINE={row.engine} --per_device_train_batch_size {tried.batch}"
    flags += f" --cost_sharding {row.cost_sharding}" if row.cost_sharding in PLACES else ""
    flags += " --activation_checkpointing" if tried.checkpointing else ""
    without = (
        ""
        if tried == asked
        else "; without checkpointing "
        f"{'or with more rows ' * (tried.batch < asked.batch)}nothing fits"
    )
    low, high = row.seconds
    gib = row.memory.total / GIB
    why = f"the simplest that fits and is nearly the fastest{without}"
    return f"{flags}: {why}; {gib:.1f} GiB a rank, {low:.3g} to {high:.3g} s a step"


# ---- what is printed -----------------------------------------------------------------------------

HEADINGS = (
    "engine", "cost", "weights", "gradients", "optimizer", "cost GiB", "activations", "loss",
    "gather", "total GiB", "fits", "largest batch", "GiB moved/step", "s/step",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """An estimate and its assumptions."""

    model: str
    nodes: int
    parameters: Parameters
    setup: Setup
    machine: Machine
    mean_tokens: float
    steps: int | None  # of the run, if the number of examples is known
    rows: list[Row]
    advice: str

    def lines(self) -> Iterator[str]:
        """Yields the assumptions, a Markdown table and the advice."""
        counts, setup, machine = self.parameters, self.setup, self.machine
        sizes = {
            "embeddings": counts.embedding,
            "decoder layers": counts.layers,
            "norm": counts.norm,
            "output layer": counts.head,
        }
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        yield f"{self.model}: {counts.total:,} parameters ({listed}{', tied' * counts.tied})"
        link = "within a node" if self.nodes == 1 else "between nodes"
        yield (
            f"{setup.ranks} rank(s), {setup.batch} x {setup.accumulation} rows a rank and step, "
            f"at most {setup.length} tokens, mean {self.mean_tokens:.4g}; "
            f"{machine.gpu} with {machine.gpu_gib:g} GiB, of which {USABLE:.0%} count"
        )
        yield (
            f"assumed: {machine.mfu:.0%} of {PEAK_FLOPS[machine.gpu] / 1e12:g} TFLOP/s, "
            f"{machine.link_gb_s:g} GB/s a rank {link}, {machine.host_gb_s:g} GB/s to the host; "
            "s/step: from all communication hidden to none"
        )
        yield ""
        yield from aligned(
            [[*HEADINGS, "h/run" if self.steps else "Mtokens/day"], *map(self._cells, self.rows)]
        )
        yield ""
        for row in [row for row in self.rows if row.host][:1]:
            yield (
                f"{row.engine} also takes {row.host / GIB / self.nodes:.0f} GiB "
                "of each host's memory"
            )
        if self.steps:
            yield f"{self.steps:,} steps"
        yield self.advice

    def _cells(self, row: Row) -> list[str]:
        setup = self.setup
        if self.steps:
            whole = [second * self.steps / 3600 for second in row.seconds]
        else:
            tokens = setup.batch * setup.accumulation * setup.ranks * self.mean_tokens
            whole = [tokens * 86400 / second / 1e6 for second in reversed(row.seconds)]
        memory = [f"{size / GIB:.1f}" for size in (*row.memory, row.memory.total)]
        fits = ["yes" if row.fits else "no", str(row.largest_batch or "none")]
        return [
            row.engine,
            row.cost_sharding,
            *memory,
            *fits,
            f"{row.moved / GIB:.1f}",
            span(row.seconds),
            span(whole),
        ]

    def as_json(self) -> str:
        """Returns everything as JSON, in bytes and seconds."""
        rows = [
            asdict(row) | {"memory": row.memory._asdict() | {"total": row.memory.total}}
            for row in self.rows
        ]
        parameters = asdict(self.parameters) | {"total": self.parameters.total}
        return json.dumps(asdict(self) | {"parameters": parameters, "rows": rows}, indent=1)


def span(values: Sequence[float]) -> str:
    """Returns "a-b", or one number if both print the same."""
    texts = [
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else "<0.001"
        for value in values
    ]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]}-{texts[1]}"


def aligned(table: list[list[str]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    yield from (lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:])
