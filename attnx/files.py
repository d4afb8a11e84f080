"""Atomic writes of files, and safe opening of regular files."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from attnx.remote import RemotePath

__all__ = ["open_regular", "replacing", "sync_folder"]


def open_regular(path: str | Path | RemotePath) -> IO[bytes]:
    """Open a regular or remote file for reading in binary. Pipes, devices, sockets and folders raise without blocking.

    Raises:
        OSError: the file is missing, can't be read, or is not a regular file.
    """
    if isinstance(path, RemotePath):
        return path.open()
    # Opening a pipe without a writer would block. O_NONBLOCK has no effect on regular files. Not all systems have
    # these flags.
    flags = (getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
    descriptor = os.open(path, os.O_RDONLY | sum(flags))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path}: expected a regular file; got a folder, pipe, socket or device")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextlib.contextmanager
def replacing(target: Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path that replaces the target at the end of the `with`: fsync, rename, and fsync of the folder.

    After an exception the target is unchanged. After a kill a hidden file `.STEM-*.tmp` may remain.

    Args:
        target: the final path.
        sync: False: no fsync. After a power failure the file may be empty.
    """
    temporary = target.with_name(f".{target.stem.lstrip('.')}-{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush the renames in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
