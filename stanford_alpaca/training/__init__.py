"""The Trainer: engines, exact steps, checkpoints, numbers in the log."""
