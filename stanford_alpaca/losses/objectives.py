"""The objectives: each is a few lines over two numbers per token, nll and log emo.

sg() in the formulas is ``detach``: weights are constants (EMO paper, section 3.3). A term
"weight * emo" is written as value.detach() * exp(log_emo - log_emo.detach()). It has the value, and
its gradient is value * d log_emo. The ratio nll / emo never appears, because it overflows float32
when emo is tiny.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stanford_alpaca.losses.own import OwnLoss, try_loss
from stanford_alpaca.losses.types import LossOfStats

MODES = ("mle", "emo", "emo2", "emd", "mix", "tailr", "mixce", "dft")
WEIGHTINGS = ("paper", "upstream")
PUBLISHED_EPSILON = 1e-10  # in the denominators of the published code


@dataclass(frozen=True)
class Objective:
    """What is minimised: a mode and its options. Calling it gives the loss of every token.

    ========= ============================================ =====================================
    mode      loss per token                               source
    ========= ============================================ =====================================
    ``mle``   nll
    ``emo``   1/2 (nll + sg(nll / emo) emo)                EMO, MLE-anchored, arXiv 2310.04691
    ``emo2``  sg(emo / nll) nll + emo                      EMO, EMO-anchored
    ``emd``   emo                                          the plain upper bound of the distance
    ``mix``   (1 - w) nll + w emo, w = emo_weight          a fixed mixture
    ``tailr`` sg(clamp(p / (g + (1 - g) p), floor, 1)) nll TaiLr, ICLR 2023; p = exp(-nll)
    ``mixce`` eta nll + (1 - eta) sg(p) nll                MixCE, ACL 2023
    ``dft``   sg(p) nll                                    arXiv 2508.05629
    ========= ============================================ =====================================

    Args:
        mode: a name of the table, or a function of your own. ``losses/own.py`` says what it gets
            and returns; it is tried here.
        emo_weighting: ``paper``, or ``upstream``, which follows the published LLaMA code: the
            weights use emo + p_y in place of emo, and their denominators get that code's 1e-10.
        emo_ratio_cap: an upper bound of nll / emo in mode ``emo``. The package EMOLoss 0.0.3 uses
            3.0.

    Raises:
        ValueError: an unknown mode or weighting, an option out of range, a weighting or cap that
            the mode does not have, or a function that ``try_loss`` refuses.
    """

    mode: str | LossOfStats = "emo"
    emo_weighting: str = "paper"
    emo_ratio_cap: float | None = None
    emo_weight: float = 0.5
    tailr_gamma: float = 1e-7
    tailr_floor: float = 0.2
    mixce_eta: float = 0.5

    def __post_init__(self) -> None:
        if callable(self.mode):
            own = self.mode if isinstance(self.mode, OwnLoss) else try_loss(self.mode)
            object.__setattr__(self, "mode", own)
        elif self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}: choose from {', '.join(MODES)}")
        if self.emo_weighting not in WEIGHTINGS:
            raise ValueError(
                f"unknown emo_weighting {self.emo_weighting!r}: choose from {', '.join(WEIGHTINGS)}"
            )
        if self.emo_weighting == "upstream" and self.mode not in ("emo", "emo2"):
            raise ValueError(
                f"emo_weighting=upstream belongs to the modes emo and emo2, not to {self.name}"
            )
        if self.emo_ratio_cap is not None and not (self.mode == "emo" and self.emo_ratio_cap > 0):
            raise ValueError("emo_ratio_cap has to be above 0 and belongs to mode emo")
        for name, low in (
            ("emo_weight", 0.0),
            ("tailr_floor", 0.0),
            ("mixce_eta", 0.0),
            ("tailr_gamma", 1e-30),
        ):
            if not low <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it has to lie between 0 and 1")

    @property
    def name(self) -> str:
        """The mode, or the name of the user's function."""
        return self.mode.name if isinstance(self.mode, OwnLoss) else str(self.mode)

    @property
    def needs_emo(self) -> bool:
        """Whether the loss reads log emo, and so needs a cost embedding."""
        if isinstance(self.mode, OwnLoss):
            return self.mode.needs_emo
        return self.mode in ("emo", "emo2", "emd", "mix")

    @property
    def needs_p(self) -> bool:
        """Whether the loss reads the probability of one target, p_y = exp(-nll).

        Soft targets do not have it. Of a function nobody knows, so it counts as one that does.
        """
        if isinstance(self.mode, OwnLoss):
            return True
        return self.mode in ("tailr", "mixce", "dft") or self.emo_weighting == "upstream"

    def __call__(
        self,
        nll: Tensor,  # [N] nats
        log_emo: Tensor | None,  # [N]; may be None where needs_emo is False
    ) -> Tensor:  # [N]
        """Returns the loss of every token, differentiable in both numbers."""
        if isinstance(self.mode, OwnLoss):
            return self.mode(nll, log_emo)
        if not self.needs_emo:
            return nll if self.mode == "mle" else self._weight_of_nll(nll.detach()) * nll
        assert log_emo is not None, "this mode needs a cost embedding"
        emo = log_emo.exp()
        if self.mode == "emd":
            return emo
        if self.mode == "mix":
            return (1 - self.emo_weight) * nll + self.emo_weight * emo
        return self._emo(nll, log_emo) if self.mode == "emo" else self._emo2(nll, emo)

    def _weight_of_nll(self, nll: Tensor) -> Tensor:
        p = torch.exp(-nll)
        if self.mode == "tailr":
            return (p / (self.tailr_gamma + (1 - self.tailr_gamma) * p)).clamp(self.tailr_floor, 1)
        if self.mode == "mixce":
            return self.mixce_eta + (1 - self.mixce_eta) * p
        return p  # dft

    def _emo(self, nll: Tensor, log_emo: Tensor) -> Tensor:
        anchor, emo = nll.detach(), log_emo.detach().exp()
        constant = torch.zeros_like(anchor)  # the part of the value that has no gradient
        if self.emo_weighting == "upstream":
            p = torch.exp(-anchor)
            ratio = anchor / (emo + p + PUBLISHED_EPSILON)
            ratio = ratio if self.emo_ratio_cap is None else ratio.clamp(max=self.emo_ratio_cap)
            value, constant = ratio * emo, ratio * p
        elif self.emo_ratio_cap is not None:
            value = torch.minimum(anchor, self.emo_ratio_cap * emo)
        else:
            value = anchor
        return 0.5 * (nll + _with_gradient_of(log_emo, value) + constant)

    def _emo2(self, nll: Tensor, emo: Tensor) -> Tensor:
        anchor, fixed = nll.detach(), emo.detach()
        if self.emo_weighting == "upstream":
            p = torch.exp(-anchor)
            return (fixed + p) / (anchor + PUBLISHED_EPSILON) * nll + emo + p
        ratio = torch.where(anchor > 0, fixed / anchor, 0.0)
        return ratio * nll + emo


def _with_gradient_of(log_emo: Tensor, value: Tensor) -> Tensor:
    """Returns a term equal to ``value`` with gradient value * d log_emo; 0 where emo is 0."""
    alive = log_emo > -torch.inf
    safe = torch.where(alive, log_emo, 0.0)
    return torch.where(alive, value * torch.exp(safe - safe.detach()), 0.0)


def as_objective(mode: "str | LossOfStats | Objective") -> Objective:
    """Returns the Objective of a mode's name or of a function, or an Objective as it is."""
    return mode if isinstance(mode, Objective) else Objective(mode)
