"""Engines and cost shardings side by side, and which to take."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from stanford_alpaca import estimate
from stanford_alpaca.anatomy import Anatomy
from stanford_alpaca.engines import PEAK_FLOPS
from stanford_alpaca.estimate import COST_SHARDINGS, Memory, Setup, precision_of, shardings_of

GIB = 2**30
NEARLY = 1.2  # closer than this the assumed rates tell nothing
USABLE = 0.92  # of a GPU's memory: the rest is for CUDA, NCCL, the allocator's gaps


@dataclass(frozen=True)
class Machine:
    """The ranks' devices and what they are assumed to do."""

    gpu: str
    gpu_gib: float
    mfu: float
    link_gb_s: float  # per rank: within a node, or the slower one between nodes
    host_gb_s: float

    @property
    def usable(self) -> float:
        return USABLE * self.gpu_gib * GIB

    def seconds(self, flops: float, moved: float, through_host: float) -> tuple[float, float]:
        """Of a step, if communication hides behind computation altogether, and if it does not at all."""
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
    anatomies: dict[str, Anatomy],
    setup: Setup,
    machine: Machine,
    mean_tokens: float,
    engines: Iterable[str],
    sharding: str | None,
) -> list[Row]:
    """The table: every engine with every cost sharding it can have, or those asked for."""
    rows = []
    for engine in engines:
        anatomy = anatomies[precision_of(engine, setup.bf16)]
        counts = anatomy.parameters
        flops, through_host = estimate.compute_flops(anatomy, setup, mean_tokens), estimate.host_traffic(counts, setup, engine)
        for cost in shardings_of(engine, setup, counts.tied):
            if sharding not in (None, cost):
                continue
            totals = {tried.batch: estimate.peak_memory(anatomy, tried, engine, cost).total for tried in batches_of(setup)}
            fitting = [batch for batch, total in totals.items() if total <= machine.usable]
            moved = estimate.traffic(counts, setup, engine, cost)
            row = Row(
                engine=engine,
                cost_sharding=cost,
                memory=estimate.peak_memory(anatomy, setup, engine, cost),
                fits=setup.batch in fitting,
                largest_batch=max(fitting, default=0),
                moved=moved,
                seconds=machine.seconds(flops, moved, through_host),
                host=estimate.host_memory(counts.total, setup, engine),
            )
            rows.append(row)
    return rows


def batches_of(setup: Setup) -> list[Setup]:
    """The same step in micro-batches of every size that divides it."""
    rows = setup.batch * setup.accumulation
    return [replace(setup, batch=size, accumulation=rows // size) for size in range(1, rows + 1) if rows % size == 0]


def recommend(rows: list[Row]) -> Row | None:
    """The simplest engine and sharding (they stand in that order) that fits and is nearly as fast as the fastest that does."""
    fitting = [row for row in rows if row.fits]
    least = min((row.seconds[1] for row in fitting), default=0.0)
    return next((row for row in fitting if row.seconds[1] <= NEARLY * least), None)


def advise(table: Callable[[Setup], list[Row]], setup: Setup) -> str:
    """What to run. If nothing fits, activation checkpointing, then smaller batches, then more ranks are tried."""
    smaller = [replace(tried, checkpointing=True) for tried in reversed(batches_of(setup)) if tried.batch < setup.batch]
    for tried in (setup, replace(setup, checkpointing=True), *smaller):
        row = recommend(table(tried))
        if row is not None:
            return flags_of(row, tried, setup)
    none = f"nothing fits on {setup.ranks} rank(s), even with --activation_checkpointing and one row at a time"
    for ranks in (setup.ranks * 2**power for power in range(1, 11)):
        row = recommend(table(replace(setup, batch=1, accumulation=1, checkpointing=True, ranks=ranks)))
        if row is not None:
            return f"{none}; {row.engine} would on {ranks}"
    return f"{none}, nor on more: take GPUs with more memory"


def flags_of(row: Row, tried: Setup, asked: Setup) -> str:
    """How a row is launched, and why."""
    flags = f"ENGINE={row.engine} --per_device_train_batch_size {tried.batch}"
    flags += f" --cost_sharding {row.cost_sharding}" if row.cost_sharding in COST_SHARDINGS else ""
    flags += " --activation_checkpointing" if tried.checkpointing else ""
    without = (
        "" if tried == asked else f"; without checkpointing {'or with more rows ' * (tried.batch < asked.batch)}nothing fits"
    )
    low, high = row.seconds
    gib = row.memory.total / GIB
    why = f"the simplest that fits and is nearly the fastest{without}"
    return f"{flags}: {why}; {gib:.1f} GiB a rank, {low:.3g} to {high:.3g} s a step"
