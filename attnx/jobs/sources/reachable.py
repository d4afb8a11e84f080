"""Distinguishes an unreachable source from unreadable rows, so that an unmounted share does not cause row errors."""

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
_PATIENCE = 60.0  # seconds; a share without its server may never respond
_KNOWN = 16


def is_unreachable(error: BaseException | None) -> bool:
    """True if an error or its cause may come from a disk, a network or permissions instead of from a row."""
    for _ in range(8):
        if error is None:
            return False
        status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
        if (isinstance(error, OSError) and error.errno in _ERRORS) or (isinstance(status, int) and 500 <= status < 600):
            return True
        error = error.__cause__ or error.__context__
    return False


class Reachable:
    """Checks if a source is still reachable. It must be reachable when this object is created.

    Args:
        path: path of the source.
        read: reader of the source.
    """

    def __init__(self, path: Path, read: Reader) -> None:
        self.path, self._read = path, read
        self._device = _device(path)
        self._known: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Record a row that could be read. The latest row of each folder is kept."""
        folder = os.path.dirname(entry.path or "")
        self._known.pop(folder, None)
        self._known[folder] = entry
        if len(self._known) > _KNOWN:
            del self._known[next(iter(self._known))]

    def why_not(self, failed: Iterable[Entry], others: Iterable[Entry]) -> str | None:
        """The reason if the source is unreachable, else None.

        Args:
            failed: unreachable rows. For each of their folders, or else for the last folder, the recorded row must
                still be readable.
            others: if no row is recorded, one of these must be readable.
        """
        folders = {os.path.dirname(entry.path or "") for entry in failed} & set(self._known)
        known = [self._known[folder] for folder in folders or list(self._known)[-1:]]
        reason: list[str | None] = [f"it did not respond within {_PATIENCE:g} s"]

        def check() -> None:
            try:
                reason[0] = self._check(known, others)
            except Exception as error:
                reason[0] = f"{type(error).__name__}: {error}"

        thread = threading.Thread(target=check, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        return reason[0]

    def _check(self, known: list[Entry], others: Iterable[Entry]) -> str | None:
        device = _device(self.path)
        if device is None:
            return "it no longer exists"
        if device != self._device:
            return "another device is mounted there"
        for entry in known:
            why = self._why_not(entry)
            if why is not None:
                return f"a row that could be read a moment ago can't be read: {why}"
        if known:
            return None
        message = None
        for entry in others:
            if entry.error is None and entry.path is not None:
                why = self._why_not(entry)
                if why is None:
                    return None
                message = message or f"several rows were tried and none can be read; the first error: {why}"
        return message

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
