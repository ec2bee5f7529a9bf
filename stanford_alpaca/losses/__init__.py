"""Objectives as functions of token statistics, and the public loss functions."""

from stanford_alpaca.losses.formulas import MODES, Objective
from stanford_alpaca.losses.linear import emo_loss, linear_emo_loss
from stanford_alpaca.token_stats import SoftTargets

__all__ = ["MODES", "Objective", "SoftTargets", "emo_loss", "linear_emo_loss"]
