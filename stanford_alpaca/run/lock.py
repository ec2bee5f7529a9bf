"""One run writes to an output folder at a time."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError

LOCK_FILE = "_lock"  # a name that the Trainer does not upload
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_ours: set[Path] = (
    set()
)  # folders that this process is in: a POSIX lock does not keep it from itself


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs from entering with the same folder; the system lets go when a process ends, however it does.

    Of the process alone: its children, which may outlive it, do not inherit a POSIX lock. It would be lost if the process
    opened and closed the file a second time. The folder is made; if nothing was written to it, it is gone again afterwards.

    Raises:
        UserError: another run is in.
    """
    if folder.resolve() in _ours:
        raise _taken(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    descriptor = _lock(file)
    _ours.add(folder.resolve())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # of a disk that fails: what failed before is to be told
            file.unlink(missing_ok=True)
        os.close(descriptor)
        _ours.discard(folder.resolve())
        with contextlib.suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _lock(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                say(
                    f"{file.parent}: its file system has no locks; see to it that no other run writes there"
                )
                return descriptor
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise _taken(file.parent) from None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)  # its owner left, and removed it, in the meantime


def _taken(folder: Path) -> UserError:
    return UserError(
        f"{folder}: another run writes here; give another --output_dir, or wait until it has ended"
    )
