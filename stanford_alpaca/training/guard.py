"""Finds NaN and Inf in loss, gradients and weights before an update, and reports loss spikes.

All ranks come to the same result.
"""

from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stanford_alpaca.console import say
from stanford_alpaca.distributed.shards import Shards, culprits, not_finite
from stanford_alpaca.errors import UserError

# a step's loss is compared with the last WINDOW losses, once there are at least LEAST of them
WINDOW, LEAST = 50, 20
# a spike exceeds their median by FAR median absolute deviations, by the factor MORE, and by RISE
FAR, MORE, RISE = 10, 1.5, 0.1
NAMED = 3  # how many tensors a message names
KINDS = ("weights", "loss", "gradients")  # a cause comes before its consequences
Found = dict[str, dict[int, list[str]]]  # kind -> rank -> names of what is not finite


class Guard:
    """Decides on all ranks, once a step's gradients are computed, whether to make its update.

    In fp16 the gradients are not checked. There Inf is to be expected, and the loss scaler skips
    those updates by itself.

    Collectives: one all-reduce of 5 float64 per step, and one of 1 float64 in ``check_weights``.
    If something is not finite, all ranks exchange a few names.

    Attributes:
        stop_requested: returns whether this rank wants the run to stop; called once per step.
        stop_agreed: whether any rank wanted to stop in the last step; the same on all ranks.
        skipping: whether the update of the present step is skipped.
        skipped, spikes: how many steps so far, including those before a resume.
    """

    def __init__(self, device: torch.device, world_size: int, allowed: int = 0, fp16: bool = False):
        self.device, self.world_size, self.allowed, self.fp16 = device, world_size, allowed, fp16
        self.stop_requested: Callable[[], bool] = lambda: False
        self.stop_agreed = self.skipping = False
        self.skipped = self.spikes = 0
        self._last: deque[float] = deque(maxlen=WINDOW)  # means over all ranks
        self._spiking = False
        self._losses: list[Tensor] = []  # of this rank's micro-batches

    def start(
        self, shards: Shards, state: dict[str, Any], compute_again: Callable[[], None] | None = None
    ) -> None:
        """Prepares for the first step.

        Args:
            shards: this rank's part of the model.
            state: the ``state_dict`` of the run that is resumed, or {}.
            compute_again: computes the step's gradients once more, this time each rank's own.
                Given where the engine averages gradients over the ranks.
        """
        self.shards, self._compute_again = shards, compute_again
        self.skipped, self.spikes = state.get("skipped", 0), state.get("spikes", 0)
        self._spiking = state.get("spiking", False)
        self._last.extend(state.get("losses", []))

    def state_dict(self) -> dict[str, Any]:
        """Returns what has to survive a resume, in types that JSON has."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "spiking": self._spiking,
            "losses": list(self._last),
        }

    def counts(self) -> dict[str, int]:
        """Returns the counts for the log: skipped steps and loss spikes, if there were any."""
        counts = {"skipped_steps": self.skipped, "loss_spikes": self.spikes}
        return {name: count for name, count in counts.items() if count}

    def begin(self) -> None:
        """Starts a new step."""
        self._losses, self.skipping = [], False

    def watch(self, loss: Tensor) -> None:
        """Takes the loss of a micro-batch.

        The losses of all micro-batches of a step, on all ranks, add up to the step's loss times
        the number of ranks.
        """
        self._losses.append(loss.detach())

    def may_update(self, step: int) -> bool:
        """Returns True if all of this step is finite on all ranks, or False if it is skipped.

        Raises:
            UserError: on all ranks, if something is not finite and the step may not be skipped.
        """
        losses = torch.stack(self._losses).to(self.device, torch.float64)
        finite, zero = losses.isfinite(), losses.new_zeros(())
        gradients = zero if self.fp16 else not_finite(self.shards.gradients(), zero)
        seen = [
            losses.where(finite, 0.0).sum(),
            self._bad_weights(),
            (~finite).sum(),
            gradients,
            zero + self.stop_requested(),
        ]
        loss, *bad, stop = self._sum(torch.stack(seen))
        self.stop_agreed = stop > 0
        if not any(bad):
            self._look_for_spike(step, loss / self.world_size)
            return True
        found = self._find(dict(zip(KINDS, bad, strict=True)))
        if found["weights"] or bad[0] or self.skipped >= self.allowed:
            raise UserError(f"step {step}: not finite: {self._names(found)}; {self._advice(found)}")
        self.skipped, self.skipping = self.skipped + 1, True
        say(
            f"step {step}: not finite: {self._names(found)}; "
            f"skipped, number {self.skipped} of {self.allowed}"
        )
        return False

    def check_weights(self, step: int) -> None:
        """Raises UserError on all ranks if a trained weight is not finite.

        One all-reduce of 1 float64.
        """
        if any(self._sum(self._bad_weights()[None])):
            found = self._find({})
            raise UserError(
                f"after step {step}: not finite: {self._names(found)}; {self._advice(found)}"
            )

    def _bad_weights(self) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return not_finite((part for _, part in self.shards.weights()), zero)

    def _sum(self, values: Tensor) -> list[float]:
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values.tolist()

    # ---- what its messages say ----

    def _find(self, bad: dict[str, float]) -> Found:
        """Names what is not finite on every rank. Looks at all weights, trained or not.

        Gradients are named only if no weight and no loss explains them.
        """
        own = {"weights": culprits(self.shards.weights(trained_only=False))}
        if bad.get("loss"):
            own["loss"] = ["the loss"] if not torch.stack(self._losses).isfinite().all() else []
        found = self._exchange(own)
        if bad.get("gradients") and not (found["weights"] or found["loss"]):
            found = averaged = self._exchange(
                {"gradients": culprits(self.shards.named_gradients())}
            )
            if averaged["gradients"] and self._compute_again is not None:
                self._compute_again()
                again = self._exchange({"gradients": culprits(self.shards.named_gradients())})
                found = again if again["gradients"] else averaged
        return found

    def _exchange(self, own: dict[str, list[str]]) -> Found:
        everyone: list[Any] = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(everyone, own)
        return {
            kind: {rank: seen[kind] for rank, seen in enumerate(everyone) if seen.get(kind)}
            for kind in KINDS
        }

    def _names(self, found: Found) -> str:
        parts = []
        for kind, ranks in found.items():
            if ranks:
                names = list(dict.fromkeys(name for seen in ranks.values() for name in seen))
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                what = {"weights": "the weight ", "loss": "", "gradients": "the gradient of "}[kind]
                parts.append(
                    what + ", ".join(names[:NAMED]) + more + self._where(kind, sorted(ranks))
                )
        return "; ".join(parts) or "a norm, of numbers too large to be squared"

    def _where(self, kind: str, ranks: list[int]) -> str:
        if self.world_size == 1:
            return ""
        sharded = {
            "weights": self.shards.of_weights,
            "loss": False,
            "gradients": self.shards.of_gradients,
        }[kind]
        numbers = (
            "all ranks"
            if len(ranks) == self.world_size
            else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        )
        return f" in the shard of {numbers}" if sharded else f" on {numbers}"

    def _advice(self, found: Found) -> str:
        if found["weights"]:
            return "go on from an earlier checkpoint, or begin again, with a lower --learning_rate"
        if self.skipped >= self.allowed > 0:
            return (
                f"the {self.allowed} of --skip_nonfinite are used up: lower --learning_rate, "
                "or look at the data"
            )
        return "lower --learning_rate, look at the data, or allow --skip_nonfinite N steps"

    def _look_for_spike(self, step: int, loss: float) -> None:
        spiking = False
        if len(self._last) >= LEAST:
            middle = median(self._last)
            spread = median(abs(value - middle) for value in self._last)
            spiking = loss > max(middle + FAR * spread, MORE * middle, middle + RISE)
            if spiking and not self._spiking:  # a loss that stays high is reported once
                say(
                    f"step {step}: the loss is {loss:.4g}; "
                    f"its median over the last {len(self._last)} steps was {middle:.4g}"
                )
        self.spikes, self._spiking = self.spikes + spiking, spiking
        self._last.append(loss)
