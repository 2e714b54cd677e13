"""Files that are either whole or absent: write under a temporary name, then rename."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from robustann.errors import RobustannError, UsageError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it becomes ``path`` if the block succeeds.

    Missing parent folders are made. On any exception, ctrl-C included, the temporary file is
    removed and a file already at ``path`` stays as it was.

    Raises:
        UsageError: the folder cannot be made or written to.
        RobustannError: the disk filled up or failed while writing.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(pathlib.Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     pathlib.Path(folder, "a.txt").read_text()
    'whole'
    """
    target = Path(path)
    check_writable_folder(target.parent)
    if target.is_dir():
        raise UsageError(f"expected a file name, got the folder '{target}'; name a file inside it")
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:80]}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes files private; a report is as readable as any file that the user makes.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except OSError as error:
        raise RobustannError(
            f"could not write '{target}': {error.strerror or error}; "
            "nothing was changed there. Free space or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically (see :func:`atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, atomically (see :func:`atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; a pipe would be waited for, a device read for ever.

    Raises:
        OSError: it is missing, may not be read, or is anything but a regular file; ``strerror``
            says which.

    >>> open_regular("/dev/null")
    Traceback (most recent call last):
    OSError: [Errno 22] no regular file: '/dev/null'
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
    return os.fdopen(handle, "rb")


def check_writable_folder(folder: str | os.PathLike[str]) -> None:
    """Make ``folder`` if it is missing and prove that a file can be made in it.

    Long work calls this first, so that hours of computation do not end at a read-only folder.

    Raises:
        UsageError: the folder cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"expected a folder that can be written to, got '{path}' "
            f"({error.strerror or error}); choose another one"
        ) from error
