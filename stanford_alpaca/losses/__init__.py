"""Objectives as functions of token statistics, and the public loss functions."""

from stanford_alpaca.losses.functional import emo_loss, linear_emo_loss
from stanford_alpaca.losses.objectives import MODES, Objective
from stanford_alpaca.losses.types import SoftTargets

__all__ = ["MODES", "Objective", "SoftTargets", "emo_loss", "linear_emo_loss"]
