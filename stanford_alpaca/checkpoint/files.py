"""Writes files of commands: each appears whole or not at all, and never over another one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.flags import check_writable


def check_new(flag: str, name: str | None) -> Path:
    """Returns the path that a flag names. Raises UserError unless a file can be made there."""
    # fire gives True for a flag without a value
    if name in (None, "", "True") or os.path.lexists(str(name)):
        raise UserError(f"--{flag} {name}: give the name of a file that does not exist yet")
    check_writable(flag, Path(str(name)))
    return Path(str(name))


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Yields a path to write to. After the block the file is there, with what was written.

    A missing folder is made. If the block fails, nothing is left behind.

    Raises:
        UserError: the disk is full or broken, or another file has the name by now.
    """
    part = file.with_name(f".part-{secrets.token_hex(4)}{file.suffix[:32]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        _place(part, file)
    except FileExistsError:
        raise UserError(
            f"{file}: appeared while this command ran, and is left as it is; "
            "give the name of another file"
        ) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be written ({_reason(error)})") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_new(file: Path, text: str) -> None:
    """Writes a new text file. See ``new_file``. Names of folders in it need not be UTF-8."""
    with new_file(file) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_lines(file: Path, text: str) -> None:
    """Appends whole lines to a file, or nothing. A missing folder is made.

    Raises:
        OSError: the disk is full or broken.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as stream:
        before, rest = stream.tell(), memoryview(text.encode(errors="backslashreplace"))
        try:
            while rest:
                rest = rest[stream.write(rest) :]
        except OSError:
            stream.truncate(before)
            raise


def _place(part: Path, file: Path) -> None:
    """Gives a written file its name. Raises FileExistsError if there is one with that name."""
    try:
        os.link(part, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
        part.replace(file)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or first_line(error)
