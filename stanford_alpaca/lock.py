"""One run writes to an output folder at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stanford_alpaca.errors import UserError

FILE = "_lock"  # a name that the Trainer does not upload


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from entering with the same folder; the system lets go when a process ends, however it does.

    The folder is made; if nothing was written to it, it is gone again afterwards.

    Raises:
        UserError: another process is in.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    descriptor = _lock(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # of a disk that fails: what failed before is to be told
            file.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _lock(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"{file.parent}: another run writes here; give another --output_dir, or wait until it has ended"
            ) from None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)  # its owner left, and removed it, in the meantime
