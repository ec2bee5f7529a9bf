"""Supervised fine-tuning with EMO (Earth Mover Distance Optimization, arXiv 2310.04691).

Importing the package imports neither torch nor transformers: the public names do, when they are
first used. So a command can answer ``--help`` at once.
"""

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stanford_alpaca.flags import end_at_once_on_sigint, exit_on_user_error
from stanford_alpaca.run.environment import check_imports

if TYPE_CHECKING:
    from stanford_alpaca.losses import Objective, SoftTargets, emo_loss, linear_emo_loss
    from stanford_alpaca.objective.attach import attach_objective

__version__ = "0.1.0"
__all__ = ["Objective", "SoftTargets", "attach_objective", "emo_loss", "linear_emo_loss"]

if Path(sys.argv[0] if sys.argv else "").name in ("-m", "emo", "train.py", "icl.py"):
    exit_on_user_error(check_imports)  # a command starts: one line and its exit status
    end_at_once_on_sigint()
    if not sys.stderr.isatty():  # no bars in pipes, in files, and in continuous integration
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
else:
    check_imports()

# torch reads these when it loads OpenMP: threads wait a moment, then sleep. See benchmarks/LOG.md.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"] = "passive", "500"

# peft and accelerate import these two where they are installed. One logs lines about optional
# kernels, the other that it found no GPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "objective.attach" if name == "attach_objective" else "losses"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
