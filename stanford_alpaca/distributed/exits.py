"""How ranks end: together, alone, or because another one is lost."""

import atexit
import os
import sys

import torch
from torch.distributed import DistError


def is_lost_rank(error: RuntimeError) -> bool:
    """Returns whether a collective failed because another rank has ended."""
    gloo = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "gloo/transport",
    )
    return isinstance(error, DistError) or any(words in str(error) for words in gloo)


def exit_after_barrier(status: int = 0) -> None:
    """Exits with the status once all ranks have called it. One barrier.

    The interpreter does not shut down: during shutdown, a gloo thread that still holds a tensor
    would abort the process (see benchmarks/LOG.md). Functions registered with ``atexit`` still run.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    exit_now(status)


def exit_now(status: int) -> None:
    """Exits this rank in the same way at once, whatever the others do."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
