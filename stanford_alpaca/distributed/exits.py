"""How ranks end: together, alone, or because another one is lost."""

import atexit
import os
import sys

import torch
from torch.distributed import DistError


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended."""
    gloo = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "gloo/transport",
    )
    return isinstance(error, DistError) or any(words in str(error) for words in gloo)


def exit_after_barrier(status: int = 0) -> None:
    """Ends this process with the status when all ranks have come here. One barrier.

    The interpreter is not taken apart: a thread of gloo that still holds a tensor would then abort the process (see
    benchmarks/LOG.md). What asked to be called at the end is called.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    exit_now(status)


def exit_now(status: int) -> None:
    """The same for one rank, whatever the others do."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
