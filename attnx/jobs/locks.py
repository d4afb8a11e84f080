"""Locks on files, which say who writes to a job's folder."""

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
    """A lock that is held. descriptor: of its file; token: written to it where the file system has no locks."""

    path: Path
    descriptor: int
    token: str | None = None

    def check(self) -> None:
        """Raises ValueError if another run has taken the file, as it can where the file system has no locks."""
        if self.token is not None and self.path.read_text(errors="replace") != self.token:
            told = f"another run began to write to {self.path.parent}, whose file system has no locks"
            raise ValueError(f"out: {told}; choose another folder for one of them")


@contextlib.contextmanager
def locked(path: Path, shared: bool = False, wait: bool = False) -> Iterator[Lock]:
    """Holds a file's lock. The file is made with its folder.

    Where the file system has no locks, that is said, and the most recent run owns the file: see `Lock.check`.

    Raises:
        ValueError: somebody else holds it.
        OSError: it can't be made.
    """
    import fcntl

    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"out: expected {path} to be a regular file; got a folder, link, pipe or device")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # To read, too: NFS refuses a shared lock otherwise.
        file = path.open("a+")
    except OSError as error:
        message = f"out: expected a folder that can be written to ({error.strerror})"
        raise OSError(error.errno, message, str(path.parent)) from error
    with file:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        token = None
        # Whoever was killed a moment ago may still be on the way out.
        for tried in range(10):
            try:
                fcntl.flock(file, how | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError as error:
                if tried == 9:
                    told = f"another run writes to {path.parent} ({path.name}); wait for it, or choose another folder"
                    raise ValueError(f"out: {told}") from error
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise OSError(error.errno, f"out: can't be locked ({error.strerror})", str(path)) from error
                told = f"the file system of {path.parent} has no locks ({error.strerror})"
                warnings.warn(f"{told}: start no second run there while this one goes on", stacklevel=4)
                if not shared:
                    token = uuid.uuid4().hex
                    path.write_text(token)
                break
        yield Lock(path, file.fileno(), token)
