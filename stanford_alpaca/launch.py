"""torchrun, except that a run which ends itself (a user's mistake, say) ends with its own exit status and no traceback.

Asked to stop (SIGTERM, SIGINT), it gives the ranks time to save what they have trained, and ends with status 75, or that of a
rank which ended otherwise. Another SIGINT is passed on to them, for which they do not save.
"""

import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from stanford_alpaca.errors import Stopped

TIME_TO_SAVE = (
    "600"  # seconds after a signal; a cluster's own limit may be shorter. torchrun alone gives 30
)
# the last two: the signal came before the rank could handle it
STOPPED = {0, Stopped.status, -signal.SIGTERM, -signal.SIGINT}


class Ranks:
    """The processes that torchrun has started last, once a signal has come."""

    def __init__(self) -> None:
        self.handlers: list = []

    def watch(self) -> None:
        """From now on, torchrun's closing of its processes passes through here."""
        close = SubprocessContext._close

        def close_and_remember(context: SubprocessContext, *args: Any, **kwargs: Any) -> None:
            self.handlers = list(context.subprocess_handlers.values())
            if isinstance(
                sys.exception(), SignalException
            ):  # torchrun's own handler would raise again
                signal.signal(signal.SIGINT, self._pass_on)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            close(context, *args, **kwargs)

        SubprocessContext._close = close_and_remember  # type: ignore[assignment, method-assign]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for handler in self.handlers:
            if handler.proc.returncode is None:  # its number is still its own
                os.killpg(handler.proc.pid, number)

    def status(self) -> int:
        """That of a stopped run, if all ranks have stopped or had ended; else the first other one."""
        codes = [handler.proc.returncode for handler in self.handlers]
        return next((as_shell(code) for code in codes if code not in STOPPED), Stopped.status)


def main() -> None:
    """``python -m stanford_alpaca.launch`` with torchrun's arguments."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TIME_TO_SAVE)
    # torch would give ranks that it starts again the store of those that died, with their addresses in it
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    ranks = Ranks()
    ranks.watch()
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            memory = " (out of memory?)" if name == "SIGKILL" else ""
            print(
                f"\nerror: rank {rank} was ended by {name}{memory}; --resume auto goes on",
                file=sys.stderr,
                flush=True,
            )
        sys.exit(as_shell(failure.exitcode))
    except SignalException:
        sys.exit(ranks.status())


def as_shell(code: int | None) -> int:
    """A process's exit code as a shell says it, 128 and the signal that ended it; SIGKILL, if even that has not ended it."""
    if code is None:
        code = -signal.SIGKILL
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
