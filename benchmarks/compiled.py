"""Compiles the Triton kernels for GPUs that are not there, and reads their machine code."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from stanford_alpaca.cost import CostRows
from stanford_alpaca.losses.types import Head

REGISTERS, WARPS_AT_MOST = 65536, 64  # of a multiprocessor of the GPUs here


class NoDevice:
    """A driver of a GPU that is not there. It is enough to compile for that GPU."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int, module: Any) -> Iterator[list[Any]]:
    """Compiles what a copy of the module of kernels launches in the block, into the list."""
    import triton

    found: list[Any] = []
    kernels = (module._statistics, module._gradient)
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
        mock.patch.object(triton.runtime.driver, "_active", NoDevice(capability)),
    ):
        launched = [kernel.run for kernel in kernels]
        for kernel, run in zip(kernels, launched, strict=True):
            kernel.run = lambda *a, run=run, **k: found.append(run(*a, **k | {"warmup": True}))
        try:
            yield found
        finally:
            for kernel, run in zip(kernels, launched, strict=True):
                kernel.run = run


@dataclass(frozen=True)
class Code:
    """What a kernel compiled to.

    Attributes:
        wide, loads: instructions of its main loop that load 16 bytes, and all that load.
        instructions, exps: of its main loop, per logit.
    """

    kernel: str
    registers: int
    spilled: int  # bytes of a thread
    wide: int
    loads: int
    instructions: float
    exps: float
    warps: int

    @property
    def resident(self) -> int:
        """Returns the warps that fit on a multiprocessor, by their registers."""
        each = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(WARPS_AT_MOST, REGISTERS // each * self.warps)


def compiled_code(
    capability: int, block: int, warps: int, vocab: int = 64, costs: str = "float32"
) -> list[Code]:
    """Compiles both kernels, without costs if ``costs`` is empty, and reads their machine code."""
    from tests.helpers import triton_kernels as copy_of

    module = copy_of(interpret=False)
    module.BLOCK, module.WARPS = block, warps
    table = torch.rand(2, vocab).to(getattr(torch, costs)) if costs else None
    rows = None if table is None else CostRows(table, torch.zeros(4, dtype=torch.long))
    product, ones = torch.zeros(4, vocab, dtype=torch.bfloat16), torch.ones(4)
    with compiling(capability, module) as found:
        chunk = module.Chunk(product, Head(None), torch.zeros(4, dtype=torch.long), rows)
        chunk.statistics()
        chunk.gradient(ones, *((ones, ones, ones) if costs else (None, ones, None)), ones)
    return [read_code(kernel, block // (32 * warps), warps) for kernel in found]


def read_code(kernel: Any, logits: int, warps: int) -> Code:
    """Reads a kernel's machine code, whose threads process so many logits in a round."""
    usage, code = (disassembled(kernel, flag) for flag in ("-res-usage", "-sass"))
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage.split(kernel.name)[-1])[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    loop = main_loop(code)
    return Code(
        kernel.name.strip("_"),
        registers,
        stack + local,
        sum(each.startswith("LDG") and ".128" in each for each in loop),
        sum(each.startswith("LDG") for each in loop),
        len(loop) / logits,
        sum(each.startswith("MUFU.EX2") for each in loop) / logits,
        warps,
    )


def disassembled(kernel: Any, flag: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loop(code: str) -> list[str]:
    """Returns the instructions between the longest branch backwards and its target."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(\S+)(.*?);", code, re.M)
    places = [int(address, 16) for address, _, _ in lines]
    spans = []
    for place, (_, name, rest) in zip(places, lines, strict=True):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < place:
            spans.append((place - int(target[1], 16), int(target[1], 16), place))
    _, first, last = max(spans)
    return [
        name for place, (_, name, _) in zip(places, lines, strict=True) if first <= place <= last
    ]
