"""Makes sure that only one run at a time writes to an output folder."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError

LOCK_FILE = "_lock"  # the Trainer does not upload files of this name
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
# Folders that this process has locked: a POSIX lock does not exclude its own process.
_ours: set[Path] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs while the context lasts.

    The operating system releases the lock when the process ends, however it ends. Child processes
    may outlive the run, but they do not inherit a POSIX lock. The process would lose the lock if it
    opened and closed the lock file a second time.

    The folder is made. If nothing was written to it, it is removed again afterwards.

    Raises:
        UserError: another run has locked the folder.
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
        with contextlib.suppress(OSError):  # a failing disk: report the first error
            file.unlink(missing_ok=True)
        os.close(descriptor)
        _ours.discard(folder.resolve())
        with contextlib.suppress(OSError):  # the folder is not empty
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
                    f"{file.parent}: its file system has no locks; "
                    "see to it that no other run writes there"
                )
                return descriptor
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise _taken(file.parent) from None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)  # meanwhile its owner has removed the file


def _taken(folder: Path) -> UserError:
    return UserError(
        f"{folder}: another run writes here; give another --output_dir, or wait until it has ended"
    )
