"""What the hand-made backward passes have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd Function that cannot be differentiated again.

    ``once_differentiable`` alone drops the second derivative in silence where the gradient that
    arrives is a constant, as it is in ``loss.backward(create_graph=True)``.
    """
    inner = once_differentiable(backward)

    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this backend has first derivatives alone, so create_graph=True is refused: "
                "choose backend='reference', or emo_loss"
            )
        return inner(ctx, *grads)

    return checked
