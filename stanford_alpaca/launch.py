"""torchrun, except that a run which ends itself (a user's mistake, say) ends with its own exit status and no traceback.

Asked to stop (SIGTERM, SIGINT), it gives the ranks time to save what they have trained, and ends with status 75.
"""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from stanford_alpaca.errors import Stopped

TIME_TO_SAVE = "600"  # seconds after a signal; a cluster's own limit may be shorter. torchrun alone gives 30


def main() -> None:
    """``python -m stanford_alpaca.launch`` with torchrun's arguments."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TIME_TO_SAVE)
    # torch would give ranks that it starts again the store of those that died, with their addresses in it
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)  # as a shell says it of a signal
    except SignalException:
        sys.exit(Stopped.status)


if __name__ == "__main__":
    main()
