"""Files at URLs that fsspec opens: `s3://`, `gs://`, `hf://`, `https://`, `memory://`.

`location` turns a URL into a `RemotePath`, which has the methods of `pathlib.Path` that the sources use. Every failure
of a client becomes an OSError with an errno, so that an outage is told from a bad file. Credentials come from the
environment or from fsspec's configuration, never from the URL.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, cast
from urllib.parse import urlsplit

__all__ = ["RemotePath", "check_no_credentials", "is_remote", "is_url", "joined", "location"]

_BLOCK = 2**20  # bytes that are read ahead in a file


def is_url(where: object) -> bool:
    """True for a text such as "s3://bucket/folder"."""
    return isinstance(where, str) and re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", where) is not None


def is_remote(path: object) -> bool:
    """True for a path that `location` made from a URL."""
    return isinstance(path, RemotePath)


def location(where: str | Path) -> Path:
    """The path of a file or folder: a `pathlib.Path`, or for a URL a `RemotePath` (typed as the former).

    Raises:
        ValueError: the URL has credentials, or fsspec can't open it.
    """
    if not is_url(where):
        return cast("Path", where) if is_remote(where) else Path(where)
    url = str(where)
    check_no_credentials(url)
    scheme = url.partition("://")[0]
    if not scheme.islower():
        raise ValueError(f"source: expected a URL with a scheme in lower case; got {scheme}://")
    try:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"source: {scheme}:// requires packages that are not installed: pip install 'attnx[fsspec]', and the one "
            f"for {scheme} ({error})"
        ) from error
    # File systems connect when they are made, and raise nearly anything.
    except Exception as error:
        raise ValueError(f"source: fsspec can't open {scheme}:// ({type(error).__name__}: {error})") from error
    if isinstance(system, LocalFileSystem):
        raise ValueError(f"source: expected a path for files of this machine; got a {scheme}:// URL")
    return cast("Path", RemotePath(system, path, scheme))


def check_no_credentials(url: str) -> None:
    """Raise ValueError for a URL with a password, a query or another URL inside, without repeating it.

    run.json and the manifest store the URL.
    """
    try:
        parts = urlsplit(url)
        secret = parts.password is not None or parts.query != ""
    except ValueError:
        secret = True
    scheme = url.partition("://")[0]
    if secret or "::" in url:
        raise ValueError(
            f"source: expected a {scheme.partition(':')[0]}:// URL without credentials, a query or another URL in it, "
            "because the job's files store it; set credentials in the environment or in fsspec's configuration"
        )


def joined(root: Path, name: str) -> Path:
    """The path of a table's entry: relative to the root, absolute, or a URL."""
    return location(name) if is_url(name) else root / name


class RemotePath:
    """A path of an fsspec file system, with the methods of `pathlib.Path` that the sources use. It can be pickled.

    Args:
        system: the fsspec file system.
        path: the path in it.
        scheme: of the URL.
    """

    def __init__(self, system: Any, path: str, scheme: str) -> None:
        self._system, self._scheme = system, scheme
        self.path = path.rstrip("/") or path

    def __str__(self) -> str:
        return self.path if is_url(self.path) else f"{self._scheme}://{self.path.lstrip('/')}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> RemotePath:
        """The path below this one. The name is never read as a URL."""
        return RemotePath(self._system, f"{self.path.rstrip('/')}/{str(name).lstrip('/')}", self._scheme)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that the path is in."""
        return RemotePath(self._system, self.path.rpartition("/")[0], self._scheme)

    def __lt__(self, other: RemotePath) -> bool:
        return self.path < other.path

    def relative_to(self, root: RemotePath) -> PurePosixPath:
        """The path below a root."""
        return PurePosixPath(self.path.removeprefix(f"{root.path.rstrip('/')}/"))

    def exists(self) -> bool:
        """True if there is a file or folder."""
        with self._errors():
            return bool(self._system.exists(self.path))

    def is_dir(self) -> bool:
        """True for a folder."""
        with self._errors():
            return bool(self._system.isdir(self.path))

    def is_file(self) -> bool:
        """True for a file."""
        with self._errors():
            return bool(self._system.isfile(self.path))

    def iterdir(self) -> Iterator[RemotePath]:
        """The files and folders in a folder."""
        with self._errors():
            names = [name.rstrip("/") for name in self._system.ls(self.path, detail=False)]
        yield from (RemotePath(self._system, name, self._scheme) for name in names if name != self.path)

    def walk(self) -> list[str]:
        """The names of all files below the folder, relative to it, sorted. All of them are in memory."""
        with self._errors():
            root = f"{self.path.rstrip('/')}/"
            return sorted(name.removeprefix(root) for name in self._system.find(self.path) if not name.endswith("/"))

    def stat(self) -> SimpleNamespace:
        """st_size in bytes, st_mtime (a text that changes with the file) and st_dev."""
        with self._errors():
            info = self._system.info(self.path)
        stamps = [str(info[name]) for name in ("ETag", "mtime", "LastModified", "created", "updated") if info.get(name)]
        return SimpleNamespace(st_size=info.get("size"), st_mtime=" ".join(stamps), st_dev=0)

    def open(self) -> IO[bytes]:
        """Open the file for reading at any position."""
        with self._errors():
            file = self._system.open(self.path, "rb", block_size=_BLOCK)
        return io.BufferedReader(_Raw(file, self), _BLOCK)

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from `start`, in one request.

        Raises:
            OSError: also if the server returns more than it was asked for.
        """
        with self._errors():
            content = bytes(self._system.cat_file(self.path, start=start, end=start + size))
            if len(content) > size:
                raise OSError(f"asked for {size:,} bytes and got {len(content):,}: the server has no byte ranges")
            return content

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Clients raise exceptions of their own for networks, certificates and credentials."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from error
        except PermissionError as error:
            raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)} ({error})", str(self)) from error
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(self)) from error


class _Raw(io.RawIOBase):
    """A remote file whose every access raises OSError where the client fails."""

    def __init__(self, file: Any, path: RemotePath) -> None:
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._path._errors():
            content = self._file.read(len(buffer))
            buffer[: len(content)] = content
            return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._path._errors():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        with self._path._errors():
            return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
