"""Measures time and memory of the contenders, each in processes of its own."""

import ctypes
import functools
import gc
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Batch, Call, Case, Unavailable, build, make_batch
from stanford_alpaca.checkpoint.space import MIB

# What the launcher sets on a CPU, so that freed tensors stay with the process. Both variables are
# needed. Setting the first alone turns off glibc's dynamic thresholds, so the heap is still trimmed
# to 128 KiB of free memory as often as without it.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**30), "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
FLOOR = "floor"  # the three matrix products alone
# PyTorch's profiler otherwise prints a notice in every process.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Setup:
    """The input of a measuring process."""

    case: Case
    names: tuple[str, ...]
    threads: int


def environments(device: str) -> dict[str, dict[str, str]]:
    """Returns the environment variables under which everything is timed, by name."""
    return {"default": {}, "launcher": ALLOCATOR} if device == "cpu" else {device: {}}


# ---- all contenders ------------------------------------------------------------------------------


def measure(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """Returns a row per contender.

    A row has seconds and page faults by environment and the peak memory, or the reason why the
    contender was left out.
    """
    forget_allocator()  # a shell may have set it for all
    peaks: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    faults: dict[str, dict[str, list[int]]] = {}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(worker(variables))
            for name, variables in environments(setup.case.device).items()
        }
        left_out: dict[str, str] = {}
        for pool in workers.values():
            left_out |= pool.submit(warm_up, setup).result()
        for start in range(rounds):
            for environment, pool in workers.items():
                for name, (took, faulted) in pool.submit(one_round, setup, start).result().items():
                    seconds.setdefault(name, {}).setdefault(environment, []).append(took)
                    faults.setdefault(name, {}).setdefault(environment, []).append(faulted)
        if setup.case.device != "cpu":
            (pool,) = workers.values()
            peaks = {
                name: pool.submit(cuda_peak, setup, name).result()
                for name in seconds
                if name != FLOOR
            }
    if setup.case.device == "cpu":  # now that the other processes have ended
        peaks = {name: fresh_peak(setup, name) for name in seconds if name != FLOOR}
    rows = [
        {
            "contender": name,
            "seconds": seconds[name],
            "minor_faults": faults[name],
            **peaks.get(name, {}),
        }
        for name in (FLOOR, *setup.names)
        if name not in left_out
    ]
    return rows + [{"contender": name, "left_out": reason} for name, reason in left_out.items()]


@contextmanager
def worker(variables: dict[str, str]) -> Iterator[ProcessPoolExecutor]:
    """Starts a new process with these environment variables.

    glibc reads its variables once, when the process starts.
    """
    os.environ.update(variables)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(os.getpid).result()
        finally:
            forget_allocator()
        yield pool


def forget_allocator() -> None:
    for name in ALLOCATOR:
        os.environ.pop(name, None)


# ---- within a process: time ----------------------------------------------------------------------


@functools.cache
def stage(setup: Setup) -> tuple[Batch, dict[str, Call], dict[str, str]]:
    """Returns the batch, the steps, and the reasons why contenders are left out.

    There is a step (forward and backward) for every contender that runs.
    """
    torch.set_num_threads(setup.threads)
    batch = make_batch(setup.case)
    steps: dict[str, Call] = {FLOOR: floor(batch)}
    left_out = {}
    for name in setup.names:
        try:
            steps[name] = build(name, batch)
            steps[name]().backward()
        except Unavailable as error:
            left_out[name] = one_line(error)
        except Exception as error:  # other packages raise anything on tensors they do not support
            left_out[name] = f"{type(error).__name__}: {one_line(error)}"
        if name in left_out:
            steps.pop(name, None)
        clear(batch)
    return batch, steps, left_out


def warm_up(setup: Setup) -> dict[str, str]:
    """Builds everything and runs every contender twice. Returns why some are left out."""
    _, _, left_out = stage(setup)
    one_round(setup, 0)
    return left_out


def one_round(setup: Setup, start: int) -> dict[str, tuple[float, int]]:
    """Returns seconds and minor page faults of one step of every contender.

    Contenders run one after the other. Each round starts with another one.
    """
    batch, steps, _ = stage(setup)
    names = list(steps)
    start %= len(names)
    return {name: timed(steps[name], batch) for name in names[start:] + names[:start]}


def timed(step: Call, batch: Batch) -> tuple[float, int]:
    clear(batch)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if batch.hidden.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        forward_backward(step)
        end.record()
        torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) / 1000
    else:
        began = time.perf_counter()
        forward_backward(step)
        seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def forward_backward(step: Call) -> None:
    loss = step()
    if loss.requires_grad:
        loss.backward()


def floor(batch: Batch) -> Call:
    """Returns a step of only the products for the logits and for both gradients.

    They write into existing tensors: 6 N H V operations at this machine's rate.
    """
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    logits, d_hidden, d_weight = (
        hidden @ weight.T,
        torch.empty_like(hidden),
        torch.empty_like(weight),
    )

    def products() -> torch.Tensor:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if not batch.weight.requires_grad:
            return d_hidden
        return torch.mm(logits.T, hidden, out=d_weight)

    return products


def clear(batch: Batch) -> None:
    batch.hidden.grad = batch.weight.grad = None
    gc.collect(1)  # frees the last step's tensors; a full collection takes longer than a step


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---- within a process: memory --------------------------------------------------------------------


def fresh_peak(setup: Setup, name: str) -> dict[str, float]:
    """Runs ``cpu_peak`` in a fresh process under the default allocator.

    Returns an empty dictionary if the contender cannot run.
    """
    context = get_context("forkserver")  # imports torch once
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return pool.submit(cpu_peak, setup, name).result()


def cpu_peak(setup: Setup, name: str) -> dict[str, float]:
    """Measures resident memory of a first step on a CPU.

    Returns the peak above the level before the step, and what the contender keeps between steps.
    The heap layout moves this peak by a few blocks from process to process. The peak of the tensors
    does not move.
    """
    torch.set_num_threads(setup.threads)
    try:
        small = replace(setup.case, hidden=16, vocab=300, tokens=64, ids=(), states="")
        forward_backward(build(name, make_batch(small)))
        batch = make_batch(setup.case)  # by now libraries have loaded and started what they need
        inputs = resident_mib("VmRSS")
        step = build(name, batch)
        level = resident_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak VmHWM
        forward_backward(step)
    except Unavailable:
        return {}
    peak = resident_mib("VmHWM") - level
    clear(batch)
    return {
        "peak_extra_mib": peak,
        "peak_tensors_mib": peak_tensors_mib(step),
        "kept_mib": level - inputs,
    }


def resident_mib(entry: str) -> float:
    """Returns VmRSS, or its peak VmHWM, in MiB.

    First it returns free memory to the system, which would otherwise hide later allocations.
    """
    gc.collect(1)
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[entry].split()[0]) / 1024


def peak_tensors_mib(step: Call) -> float:
    """Returns the most memory that a step's tensors hold at a time, in MiB.

    It counts as PyTorch does on a GPU: without the heap and without buffers of libraries.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(step)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return (
        max(
            accumulate(
                event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
            )
        )
        / MIB
    )


def cuda_peak(setup: Setup, name: str) -> dict[str, float]:
    """Measures the same with PyTorch's CUDA allocator.

    It counts allocated tensors, so its cache hides nothing.
    """
    batch, _, _ = stage(setup)
    clear(batch)
    inputs = torch.cuda.memory_allocated()
    step = build(name, batch)
    level = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_backward(step)
    peak = torch.cuda.max_memory_allocated()
    clear(batch)
    return {"peak_extra_mib": (peak - level) / MIB, "kept_mib": (level - inputs) / MIB}
