"""Runs the training command as a rank under a real launcher, and kills rank 1 once.

Usage: ``rank.py WHERE AT FLAGS OF THE TRAINING COMMAND``

If WHERE is ``hang``, rank 1 is killed in a step, and rank 0 waits in that step forever.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from stanford_alpaca.train import main
from tests.faults.hooks import Fault, Hooks

if __name__ == "__main__":
    where, at, *argv = sys.argv[1:]
    out = Path(argv[argv.index("--output_dir") + 1])
    hangs = where == "hang" and os.environ["RANK"] == "0"
    fault = (
        Fault("wait", "step", int(at))
        if hangs
        else Fault("kill", "step" if where == "hang" else where, int(at), (1,), once=True)
    )
    Hooks(fault, out).install()
    sys.argv = [sys.argv[0], *argv]
    main()
