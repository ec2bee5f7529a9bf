"""A rank under a real launcher that is killed once: ``rank.py WHERE AT FLAGS OF THE TRAINING COMMAND``; rank 1 is the one."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from stanford_alpaca.train import main
from tests.faults.hooks import Fault, Hooks

if __name__ == "__main__":
    where, at, *argv = sys.argv[1:]
    out = Path(argv[argv.index("--output_dir") + 1])
    Hooks(Fault("kill", where, int(at), (1,), once=True), out).install()
    sys.argv = [sys.argv[0], *argv]
    main()
