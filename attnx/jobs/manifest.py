"""The manifest: all rows of a job in a fixed order. A shard is a slice of it."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx.files import open_regular
from attnx.jobs.shards import DamagedError
from attnx.jobs.sources import Entry, text_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Manifest", "file_sha256", "write_manifest"]

_GROUP = 65_536  # rows


def write_manifest(entries: Iterable[Entry], path: Path) -> int:
    """Write Parquet with the columns of `Entry` (path: the bytes of the file's name), and return the number of rows.

    Takes the memory of one row group, and 8 bytes per row to find duplicate keys.

    Raises:
        ValueError: there are no entries, or keys are repeated. The message has the first such key and its rows.
    """
    import pyarrow.parquet as pq

    hashes, waiting = array("q"), iter(entries)
    with pq.ParquetWriter(
        path, _schema(), compression="zstd", write_statistics=["key"], write_page_checksum=True
    ) as writer:
        while chunk := list(islice(waiting, _GROUP)):
            hashes.extend(hash(entry.key) for entry in chunk)
            writer.write_table(_table(chunk))
    if not hashes:
        raise ValueError("source: expected at least one image, got none")
    seen = np.sort(np.frombuffer(hashes, np.int64))
    repeated = set(seen[1:][seen[1:] == seen[:-1]].tolist())
    if repeated:
        _refuse_duplicates(path, repeated)
    return len(hashes)


class Manifest:
    """A reader of a manifest by row number. One row group is in memory.

    Args:
        sha256: expected hash of the file; not checked if None.
        rows: expected number of rows; not checked if None.

    Raises:
        DamagedError: the file is missing or damaged.
    """

    def __init__(self, path: Path, sha256: str | None = None, rows: int | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if sha256 is not None and file_sha256(path) != sha256:
                raise DamagedError(path, "its SHA-256 is not the one in run.json")
            self._file = pq.ParquetFile(path, memory_map=False)
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(path, str(error)) from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if rows is not None and (metadata.num_rows != rows or self._file.schema_arrow.names != list(Entry._fields)):
            raise DamagedError(path, f"expected {rows:,} rows of {', '.join(Entry._fields)}")
        if any(size != _GROUP for size in sizes[:-1]):
            raise DamagedError(path, f"expected row groups of {_GROUP:,}")
        self._group: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def entries(self, start: int, stop: int) -> list[Entry]:
        """Rows start <= i < stop; fewer at the end of the manifest."""
        rows: list[Entry] = []
        while start < min(stop, len(self)):
            group = start // _GROUP
            if self._group is None or self._group[0] != group:
                self._group = (group, self._file.read_row_group(group))
            first = group * _GROUP
            part = self._group[1].slice(start - first, min(stop, first + _GROUP) - start)
            columns = part.to_pydict()
            columns["path"] = [None if name is None else os.fsdecode(name) for name in columns["path"]]
            rows += map(Entry._make, zip(*(columns[name] for name in Entry._fields), strict=True))
            start = first + _GROUP
        return rows

    def key_groups(self) -> Iterator[list[str]]:
        """All keys in order, one row group at a time."""
        for group in range(self._file.num_row_groups):
            yield self._file.read_row_group(group, columns=["key"]).column("key").to_pylist()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = (pa.string(), pa.binary(), pa.int64(), pa.int64(), pa.string(), pa.string())
    return pa.schema(list(zip(Entry._fields, kinds, strict=True)))


def _table(chunk: list[Entry]) -> pa.Table:
    import pyarrow as pa

    columns: dict[str, list[Any]] = dict(zip(Entry._fields, map(list, zip(*chunk, strict=True)), strict=True))
    # A file name may have any bytes, and a caption in JSON may have invalid Unicode.
    columns["path"] = [None if name is None else _bytes(name) for name in columns["path"]]
    for name in ("text", "error"):
        columns[name] = [None if value is None else text_of(value) for value in columns[name]]
    return pa.table(columns, _schema())


def _bytes(name: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode(errors="backslashreplace")


def _refuse_duplicates(path: Path, hashes: set[int]) -> None:
    """Raise ValueError if keys with these hashes are equal. Different keys may have the same hash."""
    rows: dict[str, list[int]] = {}
    number = 0
    for keys in Manifest(path).key_groups():
        for key in keys:
            if hash(key) in hashes:
                rows.setdefault(key, []).append(number)
            number += 1
    repeated = {key: places for key, places in rows.items() if len(places) > 1}
    if repeated:
        key, places = next(iter(repeated.items()))
        others = f"; {len(repeated) - 1} other keys are repeated, too" if len(repeated) > 1 else ""
        where = ", ".join(map(str, places[:4])) + (", ..." if len(places) > 4 else "")
        raise ValueError(f"source: expected every key once; {key[:200]!r} is in rows {where}{others}")
