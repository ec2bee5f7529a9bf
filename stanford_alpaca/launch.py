"""torchrun, except that a run which ends itself (a user's mistake, say) ends with its own exit status and no traceback."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> None:
    """``python -m stanford_alpaca.launch`` with torchrun's arguments."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode)


if __name__ == "__main__":
    main()
