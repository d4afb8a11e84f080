"""Files at URLs that fsspec opens: `s3://`, `gs://`, `hf://`, `https://`, `memory://`.

`location` turns a URL into a path object of the package universal-pathlib, with the methods of `pathlib.Path` that the
sources use. Credentials come from the environment or from fsspec's own configuration, never from the URL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

__all__ = ["is_remote", "is_url", "joined", "location", "open_remote", "read_range", "walk"]

_BLOCK = 2**20  # bytes per request of a file that is read in order


def is_url(where: object) -> bool:
    """True for a text such as "s3://bucket/folder"."""
    return isinstance(where, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def is_remote(path: object) -> bool:
    """True for a path that `location` made from a URL."""
    return not isinstance(path, str | os.PathLike)


def location(where: str | Path) -> Path:
    """The path of a file or folder: a `pathlib.Path`, or for a URL an object with its methods.

    Raises:
        ValueError: the URL has credentials, or a package that opens it is missing.
    """
    if not is_url(where):
        return cast("Path", where) if is_remote(where) else Path(where)
    url = str(where)
    if not urlsplit(url).scheme.islower() or url.startswith("file://"):
        raise ValueError(f"source: expected a path, or a URL with a scheme in lower case other than file; got {url}")
    check_no_credentials(url)
    scheme = url.partition("://")[0]
    try:
        from upath import UPath

        path = UPath(url)
        _ = path.fs
    except ImportError as error:
        raise ValueError(
            f"source: {scheme}:// requires packages that are not installed: pip install 'attnx[fsspec]', and the one "
            f"for {scheme} ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"source: fsspec can't open {scheme}:// ({error})") from error
    return cast("Path", path)


def check_no_credentials(url: str) -> None:
    """Raise ValueError for a URL with a password or a query, without repeating it: run.json stores the URL."""
    parts = urlsplit(url)
    if parts.password is not None or (parts.scheme in ("http", "https") and (parts.query or parts.username)):
        raise ValueError(
            f"source: expected a {parts.scheme}:// URL without credentials or a query, because run.json stores it; set "
            "credentials in the environment or in fsspec's configuration"
        )


def joined(root: Path, name: str) -> Path:
    """The path of a name below a root; the name may also be an absolute path or a URL."""
    return location(name) if is_url(name) else root / name


def open_remote(path: Path) -> IO[bytes]:
    """Open a remote file for reading. Raises OSError if that fails."""
    with _as_os_error(path):
        return cast("IO[bytes]", cast("Any", path).open("rb", block_size=_BLOCK))


def read_range(path: Path, start: int, size: int | None) -> bytes:
    """`size` bytes from `start` of a remote file, or all that follow, in one request."""
    with _as_os_error(path):
        remote = cast("Any", path)
        end = None if size is None else start + size
        return bytes(remote.fs.cat_file(remote.path, start=start or None, end=end))


def size_of(path: Path) -> int:
    """The size of a remote file in bytes."""
    with _as_os_error(path):
        return int(path.stat().st_size)


def walk(folder: Path) -> list[str]:
    """The names of all files below a remote folder, relative to it, sorted. All of them are in memory."""
    with _as_os_error(folder):
        remote = cast("Any", folder)
        root = remote.fs._strip_protocol(remote.path).rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in remote.fs.find(remote.path) if not name.endswith("/"))


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, f"Permission denied ({error})", str(path)) from error
    # Clients raise exceptions of their own for networks, certificates and credentials.
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(path)) from error
