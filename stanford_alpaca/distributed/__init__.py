"""Ranks: what they tell one another, who waits for whom, and how they end."""

import os

import torch

# Spares DeepSpeed its search for a device. It is read when DeepSpeed is imported.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
