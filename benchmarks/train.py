"""Compares full training with TRL's.

Run ``python -m benchmarks.train`` in the repository's root. It uses the GPU if there is one. It
measures supervised tokens per second and peak memory of our command and of TRL's SFTTrainer on the
same records and model. Each run has a process of its own. ``python -m benchmarks.train scaling``
runs the engines and cost shardings on 1 to 4 processes. It compares what they send with what the
preflight predicts, and prints the preflight's estimate for 64 and 1024 GPUs.
"""

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from benchmarks.loss import (
    RESULTS,
    SHIPPED,
    as_list,
    check_flags,
    default_device,
    device_name,
    keep,
    machine,
)
from benchmarks.measure import environments, forget_allocator, worker
from benchmarks.train_contenders import (
    CONTENDERS,
    ON_RANDOM_MODELS,
    ON_REAL_MODELS,
    OURS,
    TRL,
    Job,
    Shape,
    make_inputs,
    run_everywhere,
)
from benchmarks.train_tables import estimates, scaling_row, scaling_table, table
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_whole, command, exit_on_user_error

# On a CPU these two are timed under both allocators, most others only under the launcher's.
BOTH = ("trl", "emo")
ENGINES = (  # (contender, engine, cost sharding) of runs on several processes
    ("trl", "ddp", "replicate"),
    ("trl", "zero2", "replicate"),
    ("emo", "ddp", "replicate"),
    ("emo", "ddp", "shard"),
    ("emo", "fsdp", "replicate"),
    ("emo", "fsdp", "shard"),
    ("emo", "fsdp", "vocab_parallel"),
    ("emo", "zero1", "replicate"),
    ("emo", "zero2", "replicate"),
    ("emo", "zero3", "replicate"),
    ("emo", "zero3", "shard"),
)


@dataclass(frozen=True)
class Settings:
    """The flags of both commands. ``Options`` describes them."""

    data: str = str(SHIPPED)
    records: int = 2048
    steps: int = 7
    batch: int = 8
    max_length: int = 512
    layers: int = 4
    hidden: int = 256
    vocab: int = 32000
    threads: int = os.cpu_count() or 1
    results: str = RESULTS

    def check(self, device: str | None, rounds: int = 1) -> Shape:
        """Raises UserError before anything is measured."""
        names = ("records", "batch", "max_length", "layers", "hidden")
        sizes = [(name, getattr(self, name)) for name in names]
        check_flags(self.results, device, sizes, rounds, self.threads)
        check_whole("steps", self.steps, 2)
        check_whole("vocab", self.vocab, 300)
        if self.hidden > 64 and self.hidden % 64:
            raise UserError(f"--hidden {self.hidden}: give a multiple of 64, the width of a head")
        if not Path(self.data).is_file():
            raise UserError(f"--data {self.data}: no such file")
        return Shape(self.layers, self.hidden, self.vocab)

    def job(self, contender: str, folder: str, device: str) -> Job:
        """Returns what one process trains."""
        return Job(contender, folder, self.steps, self.batch, self.max_length, device, self.threads)


@dataclass(frozen=True)
class Options(Settings):
    """Prints a table and writes its rows to train-DEVICE.jsonl.

    New rows replace those of the same case.

    Args:
        data: a file of Alpaca records. Only records that fit in max_length tokens count.
        records: the most records to use.
        steps: optimizer steps. The first is not measured. With packing, a step sees more examples,
            so a third of the steps is run, but at least 3.
        rounds: contenders take turns, and medians count.
        batch: rows of a step.
        max_length: tokens of a row at most.
        layers, hidden, vocab: shape of a random LLaMA in float32.
        model: the folder of a real model, which takes the place of the random one.
        only: contenders, with commas; with --model also the sampled gradients and LoRA's.
        device: cpu or cuda.
        threads: threads on a CPU.
        results: the folder for the results.
    """

    rounds: int = 3
    only: str | None = None
    device: str | None = None
    model: str | None = None

    def check(self, device: str | None, rounds: int = 1) -> Shape:
        shape = super().check(device, rounds)
        if self.model is None:
            return shape
        if not (Path(self.model) / "config.json").is_file():
            raise UserError(f"--model {self.model}: no such folder of a model")
        return Shape(0, 0, 0, self.model)


def compare(options: Options) -> None:
    """Measures the contenders in turn, keeps their rows, and prints the table."""
    shape = options.check(options.device, options.rounds)
    device = options.device or default_device()
    usual = ON_RANDOM_MODELS if options.model is None else ON_REAL_MODELS
    names = usual if options.only is None else tuple(options.only.split(","))
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--only {name}: choose from {', '.join(CONTENDERS)}")
    with TemporaryDirectory() as folder, ExitStack() as stack:
        count = make_inputs(
            Path(folder), options.data, options.records, options.batch, options.max_length, shape
        )
        workers = start_workers(stack, device)
        jobs = [
            (environment, job_of(options.job(name, folder, device)))
            for environment in workers
            for name in names
            if runs(name, environment)
        ]
        found: dict[str, dict[str, Any]] = {
            job.contender: {"contender": job.contender, "runs": {}} for _, job in jobs
        }
        for start in range(options.rounds):
            turn = start * len(jobs) // options.rounds
            for environment, job in jobs[turn:] + jobs[:turn]:
                (figures,) = workers[environment].submit(run_everywhere, job).result()
                figures.pop("counted")
                figures["tokens_per_s"] = figures["targets"] / figures["seconds"]
                kept = found[job.contender]["runs"].setdefault(environment, [])
                kept.append(figures | {"steps": job.steps - 1})
                tell(f"{environment:8} {job.contender:24}", figures)
    about = describe("train", options, count, shape, device)
    rows = [about | row for row in found.values()]
    keep(Path(options.results) / f"train-{device_name(device)}.jsonl", rows)
    print(table(rows))


run = command(Options, compare)


@dataclass(frozen=True)
class Scaling(Settings):
    """Measures engines and cost shardings on several processes of this CPU.

    They run with gloo and the launcher's allocator, with --batch rows on every process. The rows go
    to train-cpu.jsonl. Collectives are counted in one more step, which is not timed.

    Args:
        data, records, steps, batch, max_length, layers, hidden, vocab, threads, results: as
            without ``scaling``.
        processes: numbers of processes, with commas.
    """

    steps: int = 5
    processes: Any = (1, 2, 4)


def scale(options: Scaling) -> None:
    """Measures every number of processes, keeps the rows, and prints the tables."""
    shape = options.check("cpu")
    ranks = as_list(options.processes)
    for number in ranks:
        check_whole("processes", number, 1)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        together = options.batch * max(ranks)
        count = make_inputs(
            Path(folder), options.data, options.records, together, options.max_length, shape
        )
        workers, rows = start_workers(stack, "cpu"), []
        about = describe("scaling", options, count, shape, "cpu")
        for number in ranks:
            alone = [(name, "none", "replicate") for name in BOTH]
            for name, engine, sharding in alone if number == 1 else ENGINES:
                job = replace(
                    options.job(name, folder, "cpu"),
                    threads=max(1, options.threads // number),
                    ranks=number,
                    engine=engine,
                    cost_sharding=sharding,
                    count=number > 1,
                )
                figures = workers["launcher"].submit(run_everywhere, job).result()
                row = scaling_row(job, figures, shape.config(options.max_length))
                rows.append(about | row)
                tell(f"{number} {name} {engine} {sharding}:", row)
    keep(Path(options.results) / "train-cpu.jsonl", rows)
    print(scaling_table(rows), estimates(), sep="\n\n")


scaling = command(Scaling, scale)


# ---- what is measured ----------------------------------------------------------------------------


def tell(what: str, figures: dict[str, Any]) -> None:
    print(f"{what} {figures['tokens_per_s']:8.0f} tokens/s", file=sys.stderr, flush=True)


def runs(name: str, environment: str) -> bool:
    """Whether a contender is measured in an environment.

    On a GPU everything computes in bfloat16, so the -bf16 contenders are left out there.
    """
    if environment == "default":
        return name in (*BOTH, "trl-as-shipped")
    return name != "trl-as-shipped" if environment == "launcher" else not name.endswith("-bf16")


def job_of(job: Job) -> Job:
    """Returns the job with fewer steps, if its contender packs."""
    packed = (TRL | OURS)[job.contender].get("packing", False)
    return replace(job, steps=max(min(3, job.steps), job.steps // 3)) if packed else job


def start_workers(stack: ExitStack, device: str) -> dict[str, Any]:
    """Starts a process per environment of ``measure.py``.

    The processes it forks inherit its variables.
    """
    forget_allocator()  # a shell may have set it for all
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device == "cpu" else "cuda")
    return {
        name: stack.enter_context(worker(variables))
        for name, variables in environments(device).items()
    }


def describe(kind: str, options: Settings, count: int, shape: Shape, device: str) -> dict[str, Any]:
    """Returns the machine and the case, which every row of the results has."""
    name = {"model": Path(shape.model).name} if shape.model else {}
    model = name or {key: value for key, value in asdict(shape).items() if key != "model"}
    sizes = {
        "batch": options.batch,
        "max_length": options.max_length,
        "steps": options.steps,
        "records": count,
        "device": device,
    }
    return {
        "machine": machine(device, options.threads),
        "case": {"kind": kind, "data": Path(options.data).name} | model | sizes,
    }


def main() -> None:
    """Runs the command."""
    scales = sys.argv[1:2] == ["scaling"]
    called, arguments = (scaling, sys.argv[2:]) if scales else (run, sys.argv[1:])
    exit_on_user_error(lambda: fire.Fire(called, command=arguments))


if __name__ == "__main__":
    main()
