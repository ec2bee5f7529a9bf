"""``torch_kernels.Chunk`` in two Triton kernels: one for the statistics, one for the gradient.

Each kernel reads the logits once, and the second overwrites them with their gradient. Both compute
in float32. Of the statistics one program processes one row, block by block. Every lane keeps its
own log-sum-exp, as a maximum and a sum relative to it, with one exp per logit. The lanes are merged
once, at the end of the row. The logits of tokens with a cost have a maximum of their own: they may
all lie so far below the rest that exp relative to the overall maximum would underflow.

Of the gradient one program processes a block of columns, row by row, and keeps the greatest entry
of each column. It adds them to those of other rows by one atomic operation a column.
"""

from __future__ import annotations  # ``tl`` is not defined without triton

from typing import Any

import torch
from torch import Tensor

from stanford_alpaca.cost import CostRows
from stanford_alpaca.losses.types import Draws, Head

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not include it
    triton = None

jit = triton.jit if triton else lambda kernel: kernel
# whether TRITON_INTERPRET=1 is set now: what counts is its value when the kernels are decorated
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
CHUNK_LOGITS = {"cuda": 2**28}  # logits held at a time: 512 MiB in bfloat16
SLICE_LOGITS: dict[str, int] = {}  # the columns of a whole chunk are sampled together
COLUMNS = None  # a chunk is sized for as many logits per token as the weight has rows
BLOCK, WARPS = 2048, 8  # 8 logits per thread: 16 bytes in bfloat16
ROWS = 16  # of a program of the gradient


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """Returns, in one line, why these kernels cannot serve a head's input and weight, or None."""
    if triton is None:
        return "triton is not installed (builds of torch for CUDA bring it)"
    if not INTERPRETED and not (hidden.is_cuda and weight.is_cuda):
        return (
            f"the hidden states are on {hidden.device} and the head is on {weight.device}: "
            "Triton needs both on a GPU"
        )
    if not INTERPRETED and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "this GPU is older than compute capability 8.0, the least that Triton serves"
    if hidden.dtype == torch.float64:
        return "the hidden states are float64: the Triton kernels compute in float32"
    return None


class Chunk:
    """The logits z = softcap(logit_scale * (product + bias)) of n tokens.

    They are computed in float32 but never stored in it.
    """

    def __init__(
        self,
        # [n, V] hidden @ weight.T in bfloat16, float16 or float32; ``gradient`` overwrites it
        product: Tensor,
        head: Head,  # its weight is not read
        targets: Tensor,  # [n] int64
        costs: CostRows | None,
    ):
        assert product.stride(1) == 1 and (costs is None or costs.table.stride(1) == 1)
        self.product, self.targets = product, targets.contiguous()
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.scale, self.softcap = (
            None if x is None else float(x) for x in (head.logit_scale, head.softcap)
        )
        self.table = None if costs is None else costs.table
        self.which = None if costs is None else costs.which.contiguous()

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the same as ``torch_kernels.Chunk.statistics``, [n] float32."""
        z_y = self.at(self.targets[:, None]).squeeze(1)
        self.top, others = torch.empty_like(z_y), torch.empty_like(z_y)
        log_w = None if self.table is None else torch.empty_like(z_y)
        self._launch(_statistics, (len(z_y),), self.top, others, log_w)
        return z_y - self.top, others, log_w

    def at(self, ids: Tensor) -> Tensor:  # [n, k] token ids -> [n, k] float32
        """Returns the logits of these tokens. Has to be called before ``gradient``."""
        z = self.product.gather(1, ids).float()
        if self.bias is not None:
            z += self.bias[ids]
        if self.scale is not None:
            z *= self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def gradient(
        self, others: Tensor, log_w: Tensor | None, alpha: Tensor, beta: Tensor | None, g_y: Tensor
    ) -> Tensor:
        """Returns the same as ``torch_kernels.Chunk.gradient``.

        Without costs, log_w and beta are not read.
        """
        return self._write_gradient(None, others, log_w, alpha, beta, g_y)

    def sample(self, draws: Draws, *vectors: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Returns the same as ``torch_kernels.Chunk.sample``, from the whole gradient."""
        greatest = self.top.new_zeros(self.product.shape[1])
        return draws.sample(self._write_gradient(greatest, *vectors), greatest)

    def _write_gradient(self, greatest: Tensor | None, *vectors: Tensor | None) -> Tensor:
        """Overwrites the product, and ``greatest`` [V] by the size of each column's entries."""
        n, vocab_size = self.product.shape
        grid = (triton.cdiv(vocab_size, BLOCK), triton.cdiv(n, ROWS))
        given = (None if x is None else x.contiguous() for x in (self.top, *vectors))
        bits = None if greatest is None else greatest.view(torch.int32)
        self._launch(_gradient, grid, *given, bits, n, ROWS=ROWS)
        return self.product

    def _launch(self, kernel: Any, grid: tuple, *rest: Any, **sizes: int) -> None:
        costs = (self.table, 0 if self.table is None else self.table.stride(0), self.which)
        logits = (self.product, self.product.stride(0), self.bias, self.scale, self.softcap)
        with torch.cuda.device_of(self.product):  # Triton launches on the current device
            kernel[grid](
                *logits,
                self.targets,
                *costs,
                *rest,
                V=self.product.shape[1],
                **sizes,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )


@jit
def _statistics(
    product,
    stride,
    bias,
    scale,
    softcap,
    targets,
    table,
    table_stride,
    which,
    tops,
    others,
    log_w,
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # n * V may exceed 2^31
    product += row * stride
    target = tl.load(targets + row).to(tl.int32)
    if table is not None:
        table += tl.load(which + row) * table_stride
    # the lowest finite float32, because -inf - -inf is NaN
    top = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    total = tl.full([BLOCK], 0, tl.float32)
    top_w, total_w = top, total
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < V
        z, _ = _logits(product, bias, scale, softcap, cols, inside)
        z = tl.where(inside & (cols != target), z, float("-inf"))
        top, total = _add(top, total, z, 1.0)
        if table is not None:
            c = tl.load(table + cols, mask=inside, other=0).to(tl.float32)
            top_w, total_w = _add(top_w, total_w, _costly(z, c), c)
    top, total = tl.reduce((top, total), 0, _merge)
    tl.store(tops + row, top)
    tl.store(others + row, tl.log(total))
    if table is not None:
        top_w, total_w = tl.reduce((top_w, total_w), 0, _merge)
        tl.store(log_w + row, (top_w - top) + tl.log(total_w))


@jit
def _gradient(
    product,
    stride,
    bias,
    scale,
    softcap,
    targets,
    table,
    table_stride,
    which,
    tops,
    others,
    log_w,
    alpha,
    beta,
    g_y,
    greatest,
    n,
    V,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < V
    most = tl.full([BLOCK], 0, tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS  # n * V may exceed 2^31
    for row in range(first, tl.minimum(first + ROWS, n)):
        own, top = product + row * stride, tl.load(tops + row)
        z, slope = _logits(own, bias, scale, softcap, cols, inside)
        g = tl.load(alpha + row) * _exp((z - top) - _finite(tl.load(others + row)))
        if table is not None:
            costs = table + tl.load(which + row) * table_stride
            c = tl.load(costs + cols, mask=inside, other=0).to(tl.float32)
            log_pi = _finite(tl.load(log_w + row))
            g += tl.load(beta + row) * (c * _exp((_costly(z, c) - top) - log_pi))
        target = tl.load(targets + row).to(tl.int32)
        g = slope * tl.where(cols == target, tl.load(g_y + row), g)
        tl.store(own + cols, g, mask=inside)
        if greatest is not None:
            size = tl.abs(g.to(product.dtype.element_ty).to(tl.float32))
            most = tl.maximum(most, tl.where(size == size, size, float("inf")))
    if greatest is not None:
        # floats that are not negative are ordered as their bits are
        bits = most.to(tl.int32, bitcast=True)
        tl.atomic_max(greatest + cols, bits, mask=inside, sem="relaxed")


@jit
def _logits(product, bias, scale, softcap, cols, inside):
    """Returns a block of logits and their derivatives by the product."""
    z, slope = tl.load(product + cols, mask=inside, other=0).to(tl.float32), 1.0
    if bias is not None:
        z += tl.load(bias + cols, mask=inside, other=0).to(tl.float32)
    if scale is not None:
        z, slope = z * scale, scale
    if softcap is not None:
        t, derivative = _tanh(z * (1 / softcap))
        z, slope = softcap * t, slope * derivative
    return z, slope


@jit
def _costly(z, c):
    """Returns the logits of tokens with a cost, and -inf for the others.

    The threshold keeps 1 / c finite, because exp(z - log_w) can come near it.
    """
    return tl.where(c > 1.2e-38, z, float("-inf"))


@jit
def _tanh(x):
    """Returns tanh and its derivative to a few units in the last place.

    The hardware's own tanh has 11 bits.
    """
    e = _exp(-2 * tl.abs(x))
    inverse = 1 / (1 + e)
    t = (1 - e) * inverse  # cancels where x is small: there the series is used
    u = x * x
    series = x * (1 + u * (-1 / 3 + u * (2 / 15 + u * (-17 / 315 + u * (62 / 2835)))))
    return tl.where(u < 1 / 16, series, tl.where(x < 0, -t, t)), 4 * e * inverse * inverse


@jit
def _exp(x):
    # like tl.exp, but without three instructions for results below 1e-38
    return tl.exp2(1.4426950408889634 * x)


@jit
def _add(top, total, z, weight):
    """Returns total exp(top) + weight exp(z), again as a pair (top, total)."""
    rise = z - top
    e = _exp(-tl.abs(rise))
    return tl.maximum(top, z), tl.where(rise > 0, total * e + weight, total + weight * e)


@jit
def _merge(top, total, top_2, total_2):
    """Returns total exp(top) + total_2 exp(top_2), again as a pair (top, total)."""
    highest = tl.maximum(top, top_2)
    return highest, total * _exp(top - highest) + total_2 * _exp(top_2 - highest)


@jit
def _finite(log_sum):
    """Returns 0 for the log of an empty sum.

    exp(-inf - 0) is 0, as it should be, and exp(-inf - -inf) would be NaN.
    """
    return tl.where(log_sum == float("-inf"), 0.0, log_sum)
