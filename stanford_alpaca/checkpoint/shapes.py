"""Checks that saved tensors have the names, shapes and dtypes of those to be loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stanford_alpaca.errors import ResumeError

Form = tuple[list[int], torch.dtype]


def tensor_form(tensor: Tensor) -> Form:
    """Returns a tensor's shape and dtype. For a sharded tensor they are those of the whole."""
    return list(tensor.shape), tensor.dtype


def check_shapes(place: Path, saved: Mapping[str, Form], wanted: Mapping[str, Form]) -> None:
    """Raises ResumeError for the first tensor that is missing, foreign, or of another form."""
    for name, (shape, dtype) in wanted.items():
        if name not in saved:
            raise ResumeError(
                f"{place}: has no {name}, which the model has; is it of another model?"
            )
        if saved[name] != (shape, dtype):
            found = " ".join(map(str, saved[name]))
            raise ResumeError(
                f"{place}: {name} is {found}, and {shape} {dtype} in the model; "
                "is it of another model?"
            )
    for name in saved:
        if name not in wanted:
            raise ResumeError(
                f"{place}: has {name}, which the model does not have; is it of another model?"
            )
