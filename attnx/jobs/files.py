"""Files that are there whole or not at all, whenever the process dies."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing", "sync_folder"]


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes the target at the end of the `with`: by fsync, rename, and fsync of the folder.

    After an exception the target is what it was; after a kill a hidden `.STEM-*.tmp` may stay.
    """
    temporary = target.with_name(f".{target.stem}-{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
