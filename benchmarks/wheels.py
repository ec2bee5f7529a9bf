"""Collects wheels for a machine without internet: ``python -m benchmarks.wheels DIR``.

They are what ``bash tests/gpu.sh`` uses and what an image with torch, transformers, accelerate and
peft may lack, the most needed first. A wheel that would make the folder larger than the limit is
left out, and said.
"""

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import fire

from stanford_alpaca.checkpoint.space import MIB
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_number, check_writable, command, exit_on_user_error, word

WANTED = (  # what needs it -> requirements, in the order of what is measured with them
    ("the package", ("fire>=0.7", "termcolor", "datasets>=4,<6")),
    ("datasets", ("multiprocess<0.70.20", "dill<0.4.2", "xxhash>=3.4")),
    ("the other side of whole training", ("trl>=1.0",)),
    ("contenders of the loss", ("liger-kernel", "cut-cross-entropy")),
    ("ROUGE", ("rouge-score>=0.1.2", "nltk", "absl-py")),
    ("QuACK", ("quack-kernels", "apache-tvm-ffi", "torch-c-dlpack-ext", "nvidia-cutlass-dsl")),
    (
        "QuACK and Liger's CuTe path",
        tuple(f"nvidia-cutlass-dsl-libs-{part}" for part in ("base", "core", "cu13")),
    ),
)
GLIBC = ("2_28", "2_27", "2_26", "2_24", "2_17", "2_5")


@dataclass(frozen=True)
class Options:
    """Downloads wheels: python -m benchmarks.wheels DIR

    Args:
        folder: a new or empty folder.
        limit_mib: the most that the folder may hold, 64 MiB by default.
        python: the Python version of the other machine.
        machine: its processor, as x86_64 or aarch64.
    """

    folder: str | None = word()
    limit_mib: float = 64
    python: str = "3.12"
    machine: str = "x86_64"


def collect(options: Options) -> None:
    """Downloads one wheel after the other and prints the size of each."""
    if options.folder is None:
        raise UserError("give DIR, a folder for the wheels")
    check_number("limit_mib", options.limit_mib, 0)
    folder = Path(options.folder)
    if folder.exists() and not (folder.is_dir() and not list(folder.iterdir())):
        raise UserError(f"{folder} is not empty: give a new folder")
    check_writable("folder", folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0.0
    for what, requirements in WANTED:
        for requirement in requirements:
            with TemporaryDirectory(dir=folder) as scratch:
                wheel = download(requirement, Path(scratch), options)
                if isinstance(wheel, str):
                    print(f"left out: {requirement} ({what}): {wheel}")
                    continue
                size = wheel.stat().st_size / MIB
                if total + size > options.limit_mib:
                    print(f"left out: {wheel.name} ({what}): {size:.1f} MiB do not fit")
                    continue
                wheel.rename(folder / wheel.name)
            total += size
            print(f"{size:6.2f} MiB  {wheel.name}  ({what})", flush=True)
    print(f"{total:6.2f} MiB of {options.limit_mib:g} in {folder}")


def download(requirement: str, folder: Path, options: Options) -> Path | str:
    """Returns the wheel, or the reason why there is none.

    A package without wheels is built here, which serves where it is pure Python.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    target = ["--only-binary=:all:", "--python-version", options.python, "--implementation", "cp"]
    for glibc in GLIBC:
        target += ["--platform", f"manylinux_{glibc}_{options.machine}"]
    target += ["--platform", f"manylinux2014_{options.machine}"]
    fetch = [*pip, "download", "--no-deps", *target, "-d", str(folder), requirement]
    build = [*pip, "wheel", "--no-deps", "-w", str(folder), requirement]
    errors = ""
    for each in (fetch, build):
        done = subprocess.run(each, capture_output=True, text=True)
        errors = done.stderr
        found = list(folder.glob("*.whl"))
        if done.returncode == 0 and (each is fetch or found[0].name.endswith("-none-any.whl")):
            return found[0]
        for wheel in found:
            wheel.unlink()
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1][:150] if lines else "it has no wheel for that Python and processor"


run = command(Options, collect)

if __name__ == "__main__":
    exit_on_user_error(partial(fire.Fire, run))
