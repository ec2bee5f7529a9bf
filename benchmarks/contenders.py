"""The contenders of ``benchmarks.loss``, by name.

Each computes a loss and the gradients of hidden states and head from one batch. The cross entropies
compute ``F.cross_entropy(hidden @ weight.T, targets)``. EMOLoss and our own contenders compute EMO,
except our mle ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.losses import linear_emo_loss

LOGITS_STD = 2.5
CACHE_MIB = 4096  # memory budget of the cached cost rows
# Tokens that fill the cache at a time: few, so that filling it does not warm up the measured call.
PIECE = 128
# Number of float32 [N, V] tensors that a contender which materializes them may hold at once, with a
# margin.
MATERIALISED = 10


class Unavailable(Exception):
    """The reason why a contender does not run here."""


@dataclass(frozen=True)
class Case:
    """What decides the tensors of a comparison."""

    shape: str
    hidden: int  # H
    vocab: int  # V
    tokens: int  # N
    device: str = "cpu"
    dtype: str = "float32"
    targets: str = "zipf"  # "zipf", or the name of the file that the ids come from
    # real token ids; if empty, Zipf-distributed ids are drawn
    ids: tuple[int, ...] = field(default=(), repr=False)
    states: str = ""  # a file of benchmarks.states, in place of random tensors
    frozen_head: bool = False  # only the hidden states get a gradient


@dataclass(frozen=True)
class Batch:
    """Leaf tensors that require gradients, the targets, and the frozen weight copy for the cost."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    embedding: Tensor  # [V, H]

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.hidden[rows], self.weight, self.targets[rows], self.embedding)

    def needs(self, device: str) -> None:
        if self.hidden.device.type != device:
            raise Unavailable(f"needs a {device} device")

    def materialises(self) -> None:
        """Raises Unavailable if this CPU has too little free memory.

        Running out of memory on a CPU would end more than one benchmark. On a GPU the error is
        caught.
        """
        wanted = MATERIALISED * 4 * len(self.targets) * len(self.weight)
        free = psutil.virtual_memory().available
        if self.hidden.device.type == "cpu" and wanted > free:
            raise Unavailable(
                f"may need {wanted / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"
            )


Call = Callable[[], Tensor]


def make_batch(case: Case) -> Batch:
    """Makes random tensors whose logits have standard deviation 2.5.

    Every other token also leans towards its target, from a little to nearly certain.
    """
    if case.states:
        return read_batch(case)
    options: dict[str, Any] = {
        "generator": torch.Generator(case.device).manual_seed(0),
        "device": case.device,
    }
    targets = make_targets(case).to(case.device)
    weight = torch.randn(case.vocab, case.hidden, **options) / case.hidden**0.5
    hidden = torch.randn(case.tokens, case.hidden, **options) * LOGITS_STD
    sure = torch.rand(case.tokens, 1, **options) * 25
    sure[::2] = 0
    hidden += sure * weight[targets]
    return as_batch(case, hidden, weight, targets)


def read_batch(case: Case) -> Batch:
    """Reads the first tokens of a file of ``benchmarks.states``."""
    tensors = read_states(case.states, case.device)
    hidden, targets = tensors["hidden"][: case.tokens], tensors["targets"][: case.tokens]
    return as_batch(case, hidden.clone(), tensors["weight"], targets)


def read_states(file: str, device: str = "cpu") -> dict[str, Tensor]:
    """Returns hidden states [N, H], targets [N] and weight [V, H] of a file of states.

    A weight in 8 bits becomes float32.
    """
    tensors = load_file(file, device)
    if "scale" in tensors:
        tensors["weight"] = tensors["weight"].float() * tensors.pop("scale")
    return tensors


def as_batch(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> Batch:
    dtype = getattr(torch, case.dtype)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype)
    embedding = weight.detach().clone()
    return Batch(hidden, weight.requires_grad_(not case.frozen_head), targets, embedding)


def make_targets(case: Case) -> Tensor:  # [N]
    """Returns the case's ids, or random Zipf-distributed ones.

    The id of rank r then has a probability in proportion to 1 / r.
    """
    if case.states:
        return load_file(case.states)["targets"][: case.tokens]
    if case.ids:
        return torch.tensor(case.ids)
    generator = torch.Generator().manual_seed(0)
    permuted = torch.randperm(case.vocab, generator=generator)
    return permuted[
        torch.multinomial(
            1 / torch.arange(1, case.vocab + 1), case.tokens, replacement=True, generator=generator
        )
    ]


# ---- ours ----------------------------------------------------------------------------------------


def ours(backend: str, kind: str, head_gradient: str = "exact") -> Callable[[Batch], Call]:
    """Returns a builder for one of our backends.

    ``kind`` is mle, or it names the cost of emo: frozen, cached (frozen, with its rows kept),
    adaptive or identity.
    """

    def build(batch: Batch) -> Call:
        if backend == "reference":
            batch.materialises()
        kept: Any = None
        if kind == "identity":
            kept = CostEmbedding(None, kind)
        elif kind in ("frozen", "cached"):
            kept = CostEmbedding(batch.embedding)

        def loss(batch: Batch) -> Tensor:
            cost = CostEmbedding(batch.weight) if kind == "adaptive" else kept
            mode = "mle" if kind == "mle" else "emo"
            return linear_emo_loss(
                batch.hidden,
                batch.weight,
                batch.targets,
                cost,
                mode=mode,
                backend=backend,
                head_gradient=head_gradient,
            )

        try:
            with torch.no_grad():
                loss(batch[:1])
        except ValueError as error:
            raise Unavailable(str(error)) from error
        if kind == "cached":
            if not hasattr(kept, "cache"):
                raise Unavailable("CostEmbedding has no method cache")
            kept.cache(CACHE_MIB)
            with torch.no_grad():
                for start in range(0, len(batch.targets), PIECE):
                    loss(batch[start : start + PIECE])
        return lambda: loss(batch)

    return build


# ---- others --------------------------------------------------------------------------------------


def plain(batch: Batch) -> Call:
    batch.materialises()
    return lambda: F.cross_entropy((batch.hidden @ batch.weight.T).float(), batch.targets)


def torch_chunked(batch: Batch) -> Call:
    """Builds PyTorch's fused head with its own choice of chunks and accumulation."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(
        batch.hidden, batch.weight, batch.targets, options=options
    )


def emoloss(batch: Batch) -> Call:
    """Builds the authors' package, on logits in the working dtype.

    It shifts the labels, so the last logits and the first label do not count.
    """
    from emo import EMOLoss

    batch.materialises()
    labels = F.pad(batch.targets, (1, 0), value=-100)[None]
    return lambda: EMOLoss(
        (F.pad(batch.hidden, (0, 0, 0, 1)) @ batch.weight.T)[None], labels, batch.embedding
    )


def liger_triton(batch: Batch) -> Call:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    batch.needs("cuda")
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(batch.weight, batch.hidden, batch.targets)


def liger_cute(batch: Batch) -> Call:
    """Builds Liger's CuTe DSL path for Hopper.

    It needs bfloat16, and N and V have to be multiples of its tiles.
    """
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        liger_fused_linear_cross_entropy_sm90,
    )

    batch.needs("cuda")
    return lambda: liger_fused_linear_cross_entropy_sm90(batch.hidden, batch.weight, batch.targets)


def cut_cross_entropy(batch: Batch) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    batch.needs("cuda")
    return lambda: linear_cross_entropy(batch.hidden, batch.weight, batch.targets)


def quack(batch: Batch) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    batch.needs("cuda")
    return lambda: chunked_linear_cross_entropy(
        batch.hidden, batch.weight, batch.targets, chunk_size=4096, reduction="mean"
    )


class Dropped(torch.autograd.Function):
    """Cross entropy without the columns of the gradient that are below 2^-12 in all of 128 tokens.

    That is the rule of cut-cross-entropy, which applies it to blocks. It is biased.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        loss = hidden.new_zeros(())
        for start in range(0, len(hidden), 128):
            rows = slice(start, start + 128)
            h, y = hidden[rows], targets[rows, None]
            g = (h @ weight.T).float()
            loss += F.cross_entropy(g, y[:, 0], reduction="sum")
            g = g.softmax(1)
            g.scatter_add_(1, y, -torch.ones_like(g[:, :1]))
            columns = (torch.maximum(g.amax(0), -g.amin(0)) >= 2**-12).nonzero()[:, 0]
            kept = g[:, columns].to(h.dtype)
            d_hidden[rows] = kept @ weight[columns]
            if ctx.needs_input_grad[1]:
                d_weight.index_add_(0, columns, kept.T @ h)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scale = grad / len(ctx.saved_tensors[0])
        d_hidden, d_weight = (scale * each for each in ctx.saved_tensors)
        return d_hidden, d_weight if ctx.needs_input_grad[1] else None, None


def dropped(batch: Batch) -> Call:
    return lambda: Dropped.apply(batch.hidden, batch.weight, batch.targets)


CROSS_ENTROPIES: dict[str, Callable[[Batch], Call]] = {
    "plain": plain,
    "torch-chunked": torch_chunked,
    "liger-triton": liger_triton,
    "liger-cute": liger_cute,
    "cce": cut_cross_entropy,
    "quack": quack,
}
OURS = {
    f"{backend}-{kind}": ours(backend, kind)
    for backend in ("chunked", "triton")
    for kind in ("mle", "frozen", "cached", "adaptive", "identity")
}
OURS |= {
    f"{backend}-{kind}-sampled": ours(backend, kind, "sampled")
    for backend in ("chunked", "triton")
    for kind in ("mle", "frozen", "cached")
}
OURS["reference-frozen"] = ours("reference", "frozen")
CONTENDERS = {**CROSS_ENTROPIES, "dropped": dropped, "emoloss": emoloss, **OURS}
PACKAGES = ("EMOLoss", "liger-kernel", "cut-cross-entropy", "quack-kernels", "triton")


def build(name: str, batch: Batch) -> Call:
    """Returns the contender's loss as a function without arguments.

    Raises Unavailable if it cannot run.
    """
    try:
        return CONTENDERS[name](batch)
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error


def versions() -> dict[str, str]:
    """Returns the versions of torch and of the compared packages that are installed."""
    found = {"torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
