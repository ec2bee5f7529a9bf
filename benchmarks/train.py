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
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
from fire.decorators import SetParseFns

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
from stanford_alpaca.flags import check_whole, exit_on_user_error, refuse_unknown

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


@SetParseFns(data=str, only=str, results=str, model=str)
def run(
    data: str = str(SHIPPED),
    records: int = 2048,
    steps: int = 7,
    rounds: int = 3,
    batch: int = 8,
    max_length: int = 512,
    layers: int = 4,
    hidden: int = 256,
    vocab: int = 32000,
    model: str | None = None,
    only: str | None = None,
    device: str | None = None,
    threads: int = os.cpu_count() or 1,
    results: str = RESULTS,
    **unknown: Any,
) -> None:
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
    refuse_unknown(unknown, run)
    shape = check(
        data,
        records,
        steps,
        batch,
        max_length,
        layers,
        hidden,
        vocab,
        rounds,
        device,
        threads,
        results,
    )
    if model is not None:
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"--model {model}: no such folder of a model")
        shape = Shape(0, 0, 0, model)
    device = device or default_device()
    usual = ON_RANDOM_MODELS if model is None else ON_REAL_MODELS
    names = usual if only is None else tuple(only.split(","))
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--only {name}: choose from {', '.join(CONTENDERS)}")
    with TemporaryDirectory() as folder, ExitStack() as stack:
        job = Job("", folder, steps, batch, max_length, device, threads)
        count = make_inputs(Path(folder), data, records, batch, max_length, shape)
        workers = start_workers(stack, device)
        jobs = [
            (environment, job_of(job, name))
            for environment in workers
            for name in names
            if runs(name, environment)
        ]
        found: dict[str, dict[str, Any]] = {
            job.contender: {"contender": job.contender, "runs": {}} for _, job in jobs
        }
        for start in range(rounds):
            turn = start * len(jobs) // rounds
            for environment, job in jobs[turn:] + jobs[:turn]:
                (figures,) = workers[environment].submit(run_everywhere, job).result()
                figures.pop("counted")
                figures["tokens_per_s"] = figures["targets"] / figures["seconds"]
                found[job.contender]["runs"].setdefault(environment, []).append(
                    figures | {"steps": job.steps - 1}
                )
                print(
                    f"{environment:8} {job.contender:24} {figures['tokens_per_s']:8.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    about = describe("train", data, count, shape, job, device, threads)
    rows = [about | row for row in found.values()]
    keep(Path(results) / f"train-{device_name(device)}.jsonl", rows)
    print(table(rows))


@SetParseFns(data=str, results=str)
def scaling(
    data: str = str(SHIPPED),
    records: int = 2048,
    steps: int = 5,
    processes: Any = (1, 2, 4),
    batch: int = 8,
    max_length: int = 512,
    layers: int = 4,
    hidden: int = 256,
    vocab: int = 32000,
    threads: int = os.cpu_count() or 1,
    results: str = RESULTS,
    **unknown: Any,
) -> None:
    """Measures engines and cost shardings on several processes of this CPU.

    They run with gloo and the launcher's allocator, with --batch rows on every process. The rows go
    to train-cpu.jsonl. Collectives are counted in one more step, which is not timed.
    """
    refuse_unknown(unknown, scaling)
    shape = check(
        data, records, steps, batch, max_length, layers, hidden, vocab, 1, "cpu", threads, results
    )
    ranks = as_list(processes)
    for number in ranks:
        check_whole("processes", number, 1)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        count = make_inputs(Path(folder), data, records, batch * max(ranks), max_length, shape)
        workers, rows = start_workers(stack, "cpu"), []
        about = describe(
            "scaling",
            data,
            count,
            shape,
            Job("", folder, steps, batch, max_length, "cpu", threads),
            "cpu",
            threads,
        )
        for number in ranks:
            for name, engine, sharding in (
                [(name, "none", "replicate") for name in BOTH] if number == 1 else ENGINES
            ):
                job = Job(
                    name,
                    folder,
                    steps,
                    batch,
                    max_length,
                    "cpu",
                    max(1, threads // number),
                    number,
                    engine,
                    sharding,
                    count=number > 1,
                )
                row = scaling_row(
                    job,
                    workers["launcher"].submit(run_everywhere, job).result(),
                    shape.config(max_length),
                )
                rows.append(about | row)
                print(
                    f"{number} {name} {engine} {sharding}: {row['tokens_per_s']:.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    keep(Path(results) / "train-cpu.jsonl", rows)
    print(scaling_table(rows), estimates(), sep="\n\n")


# ---- what is measured ----------------------------------------------------------------------------


def check(
    data: str,
    records: Any,
    steps: Any,
    batch: Any,
    max_length: Any,
    layers: Any,
    hidden: Any,
    vocab: Any,
    rounds: Any,
    device: str | None,
    threads: Any,
    results: str,
) -> Shape:
    """Raises UserError before anything is measured."""
    sizes = {
        "records": records,
        "batch": batch,
        "max_length": max_length,
        "layers": layers,
        "hidden": hidden,
    }
    check_flags(results, device, list(sizes.items()), rounds, threads)
    check_whole("steps", steps, 2)
    check_whole("vocab", vocab, 300)
    if hidden > 64 and hidden % 64:
        raise UserError(f"--hidden {hidden}: give a multiple of 64, the width of a head")
    if not Path(data).is_file():
        raise UserError(f"--data {data}: no such file")
    return Shape(layers, hidden, vocab)


def runs(name: str, environment: str) -> bool:
    """Whether a contender is measured in an environment.

    On a GPU everything computes in bfloat16, so the -bf16 contenders are left out there.
    """
    if environment == "default":
        return name in (*BOTH, "trl-as-shipped")
    return name != "trl-as-shipped" if environment == "launcher" else not name.endswith("-bf16")


def job_of(job: Job, name: str) -> Job:
    packed = (TRL | OURS)[name].get("packing", False)
    return replace(
        job, contender=name, steps=max(min(3, job.steps), job.steps // 3) if packed else job.steps
    )


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


def describe(
    kind: str, data: str, count: int, shape: Shape, job: Job, device: str, threads: int
) -> dict[str, Any]:
    """Returns the machine and the case, which every row of the results has."""
    name = {"model": Path(shape.model).name} if shape.model else {}
    model = name or {key: value for key, value in asdict(shape).items() if key != "model"}
    sizes = {
        "batch": job.batch,
        "max_length": job.max_length,
        "steps": job.steps,
        "records": count,
        "device": device,
    }
    return {
        "machine": machine(device, threads),
        "case": {"kind": kind, "data": Path(data).name} | model | sizes,
    }


def main() -> None:
    """Runs the command."""
    command, arguments = (
        (scaling, sys.argv[2:]) if sys.argv[1:2] == ["scaling"] else (run, sys.argv[1:])
    )
    exit_on_user_error(lambda: fire.Fire(command, command=arguments))


if __name__ == "__main__":
    main()
