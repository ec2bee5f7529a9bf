"""torchrun, except that a run that ends by itself keeps its exit status and shows no traceback.

A user's mistake ends a run in this way. When the launcher gets SIGTERM or SIGINT, it gives the
ranks time to save what they have trained. It then ends with status 75, or with the status of a rank
that ended otherwise. Another SIGINT is passed on to the ranks, which then end without saving.
"""

import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

from stanford_alpaca.console import show
from stanford_alpaca.errors import Stopped, UserError, first_line

# Seconds after a signal. torchrun alone gives 30. A cluster's own limit may be shorter.
TIME_TO_SAVE = "600"
# How a stopped rank may end. The last two: the signal came before the rank could handle it.
STOPPED = {0, Stopped.status, -signal.SIGTERM, -signal.SIGINT}


class Ranks:
    """The processes that torchrun has started last. They are known once it closes them."""

    def __init__(self) -> None:
        self.handlers: list = []

    def watch(self) -> None:
        """From now on, remembers the processes whenever torchrun closes them."""
        close = SubprocessContext._close

        def close_and_remember(context: SubprocessContext, *args: Any, **kwargs: Any) -> None:
            self.handlers = list(context.subprocess_handlers.values())
            # torchrun's own handler would raise again at the next signal.
            if isinstance(sys.exception(), SignalException):
                signal.signal(signal.SIGINT, self._pass_on)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            close(context, *args, **kwargs)

        SubprocessContext._close = close_and_remember  # type: ignore[assignment, method-assign]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for handler in self.handlers:
            if handler.proc.returncode is None:  # it still runs, so its process id is its own
                os.killpg(handler.proc.pid, number)

    def status(self) -> int:
        """Returns 75 if all ranks have stopped or had ended, else the first other exit status."""
        codes = [handler.proc.returncode for handler in self.handlers]
        return next((as_shell(code) for code in codes if code not in STOPPED), Stopped.status)


def main() -> None:
    """Runs ``python -m stanford_alpaca.launch`` with torchrun's arguments."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TIME_TO_SAVE)
    # Otherwise torch would give restarted ranks the store of the dead ones, which still has their
    # addresses in it.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    ranks = Ranks()
    ranks.watch()
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:  # torch would wait for minutes
            socket.create_connection(server.getsockname(), timeout=10).close()
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            memory = " (out of memory?)" if name == "SIGKILL" else ""
            show(
                f"\nerror: rank {rank} was ended by {name}{memory}; --resume auto goes on",
                to_errors=True,
            )
        sys.exit(as_shell(failure.exitcode))
    except SignalException:
        sys.exit(ranks.status())
    except (DistError, RendezvousError, OSError) as error:  # a used port, no loopback
        show(f"error: the ranks cannot meet ({first_line(error)})", to_errors=True)
        sys.exit(UserError.status)


def as_shell(code: int | None) -> int:
    """Returns an exit code as a shell reports it: 128 + N for a process that signal N ended.

    None is a process that not even SIGKILL has ended yet. It counts as ended by SIGKILL.
    """
    if code is None:
        code = -signal.SIGKILL
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
