"""A loss of the user's own: a function of the two statistics, tried before it is used.

It gets nll and log emo of some tokens, both [N], and returns their losses [N]. The backends call it
as they call the built-in modes, on a chunk of tokens at a time, and take its derivatives by
autograd. So a token's loss may depend on nothing but its own two numbers.
"""

import math
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stanford_alpaca.errors import first_line, listed, nearest
from stanford_alpaca.losses.types import LossOfStats

COPY = "own_loss.py"  # the copy of the file in a run's folder
NLL = (0.0, 1e-6, 1e-3, 0.1, 0.7, 2.0, 8.0, 30.0, 100.0)  # nats
# log emo below its greatest value, log(2 (1 - p_y)): all costs lie between 0 and 2
BELOW = (0.0, 0.7, 3.0, 12.0, 80.0, math.inf)
SHARED: dict[str, Callable[[], object]] = {  # what the whole process has
    "PyTorch's default dtype": torch.get_default_dtype,
    "PyTorch's default device": torch.get_default_device,
    "PyTorch's number of threads": torch.get_num_threads,
    "the precision of products": torch.get_float32_matmul_precision,
    "whether gradients are computed": torch.is_grad_enabled,
    "the random numbers": lambda: (torch.get_rng_state().numpy().tobytes(), random.getstate()),
}


@dataclass(frozen=True)
class OwnLoss:
    """A function that has passed the probe of ``try_loss``.

    Attributes:
        needs_emo: whether it reads log emo, and so needs a cost embedding.
        source: the bytes of the file that it was read from; empty without one.
    """

    function: LossOfStats
    name: str
    needs_emo: bool
    source: bytes = b""

    @property
    def digest(self) -> str:
        """The hash of the file, as a run's record holds it."""
        return f"sha256:{sha256(self.source).hexdigest()}"

    def __call__(self, nll: Tensor, log_emo: Tensor | None) -> Tensor:  # [N], [N] -> [N]
        loss = self.function(nll, log_emo)
        _check_kind(loss, nll)
        return loss


def read_loss(asked: str) -> OwnLoss:
    """Runs a file and returns the function that ``asked`` names, after ``try_loss``.

    Args:
        asked: ``FILE.py:NAME``.

    Raises:
        ValueError: no such file or name, an error while the file runs, or a function that
            ``try_loss`` refuses.
    """
    path, _, name = asked.rpartition(":")
    if not (path.endswith(".py") and name.isidentifier()):
        raise ValueError("give FILE.py:NAME, a file and a function in it; --mode has built-in ones")
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path} is no file")  # a pipe would be waited for
        source = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    module = ModuleType(f"own_loss_{sha256(source).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look there
    try:
        with _nothing_shared_changes(path):
            exec(compile(source, path, "exec"), module.__dict__)
    except _Changed as error:
        raise ValueError(str(error)) from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not run: {_told(error, path)}") from None
    found = vars(module)
    if name not in found:
        functions = [each for each, value in found.items() if _is_own(value, module)]
        has = listed(functions) or "no function"
        raise ValueError(f"{path} has no {name}, it has {has}{nearest(name, functions)}")
    return try_loss(found[name], name, source=source, path=path)


def try_loss(
    function: Any,
    name: str | None = None,
    device: torch.device | str = "cpu",
    source: bytes = b"",
    path: str | None = None,
) -> OwnLoss:
    """Calls a function on a probe and returns it as an ``OwnLoss``.

    The probe has the statistics of 54 tokens, from those that the model is certain of (both nll and
    emo are 0) to an nll of 100.

    Args:
        path: the file whose lines an error names.

    Raises:
        ValueError: it is no function, it fails, its losses have another shape or dtype, a loss or a
            derivative is not finite, nothing has a gradient, a second call differs, the loss of a
            token depends on other tokens, or the function changes its arguments or what the whole
            process has.
    """
    if not callable(function):
        raise ValueError(f"{name or repr(function)} is no function but {type(function).__name__}")
    called = name or str(getattr(function, "__name__", type(function).__name__))
    probe = _Probe(function, called, path or getattr(_code(function), "co_filename", None))
    with _nothing_shared_changes(called):
        return OwnLoss(function, called, _needs_emo(probe, called, *_points(device)), source)


def _needs_emo(probe: "_Probe", called: str, nll: Tensor, log_emo: Tensor) -> bool:
    """Tries a function and returns whether it reads log emo. Raises ValueError as ``try_loss``."""
    loss, a, b = probe.derivatives(nll, log_emo)
    nowhere = torch.zeros_like(nll, dtype=torch.bool)
    for what, values, wrong in (
        ("loss", loss, nowhere),
        ("derivative by nll", a, nowhere),
        ("derivative by log_emo", b, (log_emo == -torch.inf) & (b != 0)),
    ):
        for row in (wrong | ~torch.isfinite(values)).nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"{called}: the {what} is {values[row].item():g} where nll is "
                f"{nll[row].item():g} and log_emo {log_emo[row].item():g}"
            )
    probe.repeats(nll, log_emo, (loss, a, b))
    if not (a.any() or b.any()):
        raise ValueError(f"{called} has no gradient: its losses change with neither argument")
    return bool(b.any()) or probe.reads_emo(nll, loss)


def _points(device: torch.device | str) -> tuple[Tensor, Tensor]:  # [54], [54]
    nll = torch.tensor(NLL, device=device).repeat_interleave(len(BELOW))
    below = torch.tensor(BELOW, device=device).repeat(len(NLL))
    return nll, torch.log(-2 * torch.expm1(-nll)) - below


class _Probe:
    """Calls a function as the backends do."""

    def __init__(self, function: LossOfStats, name: str, path: str | None) -> None:
        self._function, self._name, self._path = function, name, path

    def call(self, nll: Tensor, log_emo: Tensor | None) -> Tensor:
        given = [(each, each.detach().clone()) for each in (nll, log_emo) if each is not None]
        try:
            loss = self._function(nll, log_emo)
            _check_kind(loss, nll)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self._name} fails: {_told(error, self._path)}") from None
        if not all(torch.equal(now.detach(), was) for now, was in given):
            raise ValueError(f"{self._name} changes its arguments in place; make new tensors")
        return loss

    def derivatives(self, nll: Tensor, log_emo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the losses and their derivatives by nll and by log emo, all [N]."""
        leaves = [nll.clone().requires_grad_(), log_emo.clone().requires_grad_()]
        with torch.enable_grad():
            loss = self.call(*leaves)
        if not loss.requires_grad:
            raise ValueError(f"{self._name} has no gradient: its losses are constants")
        try:
            grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        except Exception as error:
            raise ValueError(f"{self._name} has no gradient: {_told(error, self._path)}") from None
        a, b = (torch.zeros_like(nll) if grad is None else grad.detach() for grad in grads)
        return loss.detach(), a, b

    def repeats(self, nll: Tensor, log_emo: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> None:
        """Raises ValueError unless other batches of the same tokens have what was found.

        Args:
            found: what ``derivatives`` returned.
        """
        with torch.no_grad():
            if not torch.equal(self.call(nll, log_emo), found[0]):
                raise ValueError(f"{self._name}: a second call returns other losses")
            self.call(nll[:0], log_emo[:0])
        backwards = torch.arange(len(nll) - 1, -1, -1, device=nll.device)
        for rows in (backwards, backwards[:7]):
            again = self.derivatives(nll[rows], log_emo[rows])
            for what, one, two in zip(("loss", "gradient", "gradient"), again, found, strict=True):
                if not torch.allclose(one, two[rows], rtol=1e-4, atol=1e-6):
                    raise ValueError(
                        f"{self._name}: the {what} of a token depends on the tokens beside it, "
                        "which are others in each chunk"
                    )

    @torch.no_grad()
    def reads_emo(self, nll: Tensor, loss: Tensor) -> bool:
        """Returns whether the losses need log emo: whether they fail, or differ, without it."""
        try:
            return not torch.equal(self.call(nll, None), loss)
        except ValueError:
            return True


def _check_kind(loss: Any, nll: Tensor) -> None:
    """Raises ValueError unless these can be the losses of tokens."""
    if type(loss) is not type(nll):
        raise ValueError(f"it returned {type(loss).__name__}, wanted a tensor of losses [N]")
    if loss.shape != nll.shape:
        raise ValueError(
            f"it returned losses of shape {tuple(loss.shape)} for {len(nll)} tokens, "
            f"wanted {tuple(nll.shape)}: one for each token, not summed"
        )
    for name in ("dtype", "device", "layout"):
        is_now, wanted = getattr(loss, name), getattr(nll, name)
        if is_now != wanted:
            raise ValueError(f"it returned losses in {is_now}, wanted that of nll, {wanted}")


class _Changed(ValueError):
    """Something of the whole process was changed."""


@contextmanager
def _nothing_shared_changes(who: str) -> Iterator[None]:
    """Raises _Changed if the block changes what the whole process has."""
    before = {name: read() for name, read in SHARED.items()}
    yield
    for name, read in SHARED.items():
        if read() != before[name]:
            raise _Changed(f"{who} changes {name}, which the whole run shares; leave that alone")


def _is_own(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _told(error: BaseException, path: str | None) -> str:
    """Returns an error in one line, with the last line of the file that it passed through."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    if isinstance(error, SyntaxError):
        lines, said = [error.lineno], str(error.msg)
    else:
        said = first_line(error)
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    at = f" (line {lines[-1]})" if lines and lines[-1] else ""
    return f"{kind}{said}{at}"
