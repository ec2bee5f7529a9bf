"""Ranks: what they tell one another, who waits for whom, and how they end."""

import os

import torch

# Spares DeepSpeed its search for a device, and a warning. It is read when DeepSpeed is imported,
# and everything here that could import DeepSpeed imports this package first.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
