"""Objectives as functions of token statistics, and the public loss functions."""

from stanford_alpaca.losses.formulas import MODES, Objective
from stanford_alpaca.losses.linear import emo_loss, linear_emo_loss

__all__ = ["MODES", "Objective", "emo_loss", "linear_emo_loss"]
