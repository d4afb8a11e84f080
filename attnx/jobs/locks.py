"""File locks, so that only one run writes to a job's folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Lock", "locked"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Lock:
    """A held lock. descriptor: of its file. token: content of the file if the file system has no locks."""

    path: Path
    descriptor: int
    token: str | None = None

    def check(self) -> None:
        """Raise ValueError if another run has taken the file. This can happen if the file system has no locks."""
        if self.token is not None and self.path.read_text(errors="replace") != self.token:
            message = f"another run writes to {self.path.parent}, whose file system has no locks"
            raise ValueError(f"out: {message}; choose another folder for one of them")


@contextlib.contextmanager
def locked(path: Path, shared: bool = False, wait: bool = False) -> Iterator[Lock]:
    """Hold the lock of a file. The file and its folder are created.

    If the file system has no locks, a warning is issued, and the most recent run owns the file: see `Lock.check`.

    Args:
        shared: a shared instead of an exclusive lock.
        wait: wait for the lock instead of raising.

    Raises:
        ValueError: another process holds the lock.
        OSError: the file can't be created.
    """
    import fcntl

    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"out: expected {path} to be a regular file; got a folder, link, pipe or device")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for reading as well, because NFS requires it for a shared lock.
        file = path.open("a+")
    except OSError as error:
        message = f"out: expected a writable folder ({error.strerror})"
        raise OSError(error.errno, message, str(path.parent)) from error
    with file:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        token = None
        # A process that was just killed may still hold the lock for a moment.
        for tried in range(10):
            try:
                fcntl.flock(file, how | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError as error:
                if tried == 9:
                    message = (
                        f"another run writes to {path.parent} ({path.name}); wait for it, or choose another folder"
                    )
                    raise ValueError(f"out: {message}") from error
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise OSError(error.errno, f"out: can't be locked ({error.strerror})", str(path)) from error
                message = f"the file system of {path.parent} has no locks ({error.strerror})"
                warnings.warn(f"{message}: don't start a second run there while this one is running", stacklevel=4)
                if not shared:
                    token = uuid.uuid4().hex
                    path.write_text(token)
                break
        yield Lock(path, file.fileno(), token)
