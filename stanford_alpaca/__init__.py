"""Supervised fine-tuning with EMO (Earth Mover Distance Optimization, arXiv 2310.04691)."""

import logging
import os
import sys

from stanford_alpaca.flags import exit_on_user_error
from stanford_alpaca.run.environment import check_imports

if sys.argv[:1] == ["-m"]:  # a command is starting: an error becomes one line and an exit status
    exit_on_user_error(check_imports)
else:
    check_imports()

# torch reads these when it loads OpenMP: threads spin for a moment, then sleep (benchmarks/LOG.md)
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"] = "passive", "500"

# peft imports bitsandbytes if it is installed, and bitsandbytes logs notes on optional kernels
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed its search and a warning

from stanford_alpaca.losses import Objective, SoftTargets, emo_loss, linear_emo_loss
from stanford_alpaca.objective.attach import attach_objective

__version__ = "0.1.0"
__all__ = ["Objective", "SoftTargets", "attach_objective", "emo_loss", "linear_emo_loss"]
