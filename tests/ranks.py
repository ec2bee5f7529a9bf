"""Runs functions on several ranks.

The ranks are forked from one process that has imported everything, so they start quickly.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# Seconds until the next rank has to end. Only a hang takes this long, even on a busy machine.
TIMEOUT = 600.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.warm"])


class RanksFailed(AssertionError):
    """A rank raised or died. The message has the last output of every rank."""


def run_ranks(world_size: int, function: Callable, *args: Any, launched: bool = True) -> list[Any]:
    """Runs ``function(*args)`` on ranks 0 to world_size - 1. Returns what each returned.

    The ranks get torchrun's environment. The function, its arguments and its results have to be
    picklable. The function initializes the process group itself (``gloo``), or the Trainer does.
    ``launched=False`` runs one process as ``python -m`` would, without a launcher.

    Raises:
        RanksFailed: a rank raised or ended early, or no rank ended within ``TIMEOUT``.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank{rank}.txt" for rank in range(world_size)]
        processes, pipes = start_ranks(outputs, function, args, launched)
        try:
            results: list[Any] = [None] * world_size
            waiting = dict(zip(pipes, range(world_size), strict=True))
            while waiting:
                ready = wait(list(waiting), timeout=TIMEOUT)
                if not ready:
                    raise RanksFailed(
                        f"ranks {list(waiting.values())} did not end\n{_tails(outputs)}"
                    )
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    try:
                        ok, results[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        ok, results[rank] = False, "ended without a result"
                    if not ok:
                        raise RanksFailed(f"rank {rank}: {results[rank]}\n{_tails(outputs)}")
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def start_ranks(
    outputs: list[Path], function: Callable, args: tuple, launched: bool = True
) -> tuple[list, list]:
    """Starts ``function(*args)`` as one rank per output file.

    Each rank prints to its file. Returns the processes, and the pipes to their results.
    """
    environment = _environment(len(outputs)) if launched else {}
    processes, pipes = [], []
    for rank, output in enumerate(outputs):
        receiver, sender = _FORKS.Pipe(duplex=False)
        mine = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else {})
        process = _FORKS.Process(
            target=_rank, args=(sender, mine, str(output), os.getcwd(), function, args), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    return processes, pipes


def start_gloo() -> None:
    """Starts a process group for a function that needs one and runs no Trainer."""
    import torch

    torch.distributed.init_process_group("gloo")


def _environment(world_size: int) -> dict[str, str]:
    port = _free_port()
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    """Returns a free port below the range that the system gives to connections.

    A connection could take a port of that range before rank 0 does.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _tails(outputs: list[Path]) -> str:
    texts = [output.read_text(errors="replace") if output.exists() else "" for output in outputs]
    return "\n".join(f"--- rank {rank}:\n{text[-3000:]}" for rank, text in enumerate(texts))


def _rank(
    pipe, environment: dict[str, str], output: str, folder: str, function: Callable, args: tuple
) -> None:
    gc.freeze()  # imports are exempt from the Trainer's garbage collection
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        result = (True, function(*args))
    except BaseException as error:
        traceback.print_exc()
        result = (False, f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Results are sent by value, because shared memory would be lost with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    import torch

    if result[0] and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no rank leaves while another one still communicates with it
    os._exit(0)
