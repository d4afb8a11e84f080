"""Tells a source that has gone from rows that can't be read: a share that is unmounted costs no row its map."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from attnx.files import open_regular
from attnx.jobs.sources import Entry, Reader

__all__ = ["Reachable", "is_unreachable"]

_ERRORS = {
    errno.EACCES, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EIO, errno.EMFILE,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENFILE, errno.ENODEV, errno.ENOENT, errno.ENOTCONN, errno.ENOTDIR,
    errno.ENXIO, errno.EPERM, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
_PATIENCE = 60.0  # seconds: a share whose server is gone may answer nothing at all
_KNOWN = 16


def is_unreachable(error: BaseException | None) -> bool:
    """True if an error, or what caused it, may be the fault of a disk, a network or permissions, and not of a row."""
    for _ in range(8):
        if error is None:
            return False
        status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
        if (isinstance(error, OSError) and error.errno in _ERRORS) or (isinstance(status, int) and 500 <= status < 600):
            return True
        error = error.__cause__ or error.__context__
    return False


class Reachable:
    """A source that was there when this was made.

    Args:
        path: of the source.
        read: its reader.
    """

    def __init__(self, path: Path, read: Reader) -> None:
        self.path, self._read = path, read
        self._device = _device(path)
        self._known: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """A row that could be read; the latest of each folder is kept."""
        folder = os.path.dirname(entry.path or "")
        self._known.pop(folder, None)
        self._known[folder] = entry
        if len(self._known) > _KNOWN:
            del self._known[next(iter(self._known))]

    def why_not(self, failed: Iterable[Entry], others: Iterable[Entry]) -> str | None:
        """Why the source can't be reached; None if it can.

        failed: rows that can't be reached. Of each one's folder, or else of the last folder, a row that could be read
        before must still be readable.
        others: rows of which one must be readable, where none is known that was.
        """
        folders = {os.path.dirname(entry.path or "") for entry in failed} & set(self._known)
        known = [self._known[folder] for folder in folders or list(self._known)[-1:]]
        found: list[str | None] = [f"it did not answer within {_PATIENCE:g} s"]

        def look() -> None:
            try:
                found[0] = self._look(known, others)
            except Exception as error:
                found[0] = f"{type(error).__name__}: {error}"

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        return found[0]

    def _look(self, known: list[Entry], others: Iterable[Entry]) -> str | None:
        device = _device(self.path)
        if device is None:
            return "it is not there any more"
        if device != self._device:
            return "another device is mounted there"
        for entry in known:
            why = self._why_not(entry)
            if why is not None:
                return f"a row that could be read a moment ago can't be read: {why}"
        if known:
            return None
        told = None
        for entry in others:
            if entry.error is None and entry.path is not None:
                why = self._why_not(entry)
                if why is None:
                    return None
                told = told or f"of some rows tried, none can be read; the first: {why}"
        return told

    def _why_not(self, entry: Entry) -> str | None:
        try:
            path, content = self._read(entry)
            if content is None:
                with open_regular(path) as file:
                    file.read(1)
        except Exception as error:
            return f"{type(error).__name__}: {error}" if is_unreachable(error) else None
        return None


def _device(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except OSError:
        return None
