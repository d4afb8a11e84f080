"""Parquet files with embedded pictures, as on the Hugging Face hub: a column of {bytes, path}, or of bytes."""

import functools
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attnx.files import open_regular
from attnx.jobs.sources import Entry, text_of, wrong_caption
from attnx.jobs.sources.remote import whole_file
from attnx.limits import PICTURE_BYTES
from attnx.remote import is_remote, joined

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["Pictures", "footer_hash", "picture_column", "picture_entries"]

# Accepted names of a column of plain bytes. A column of {bytes, path} may have any name.
BINARY_NAMES = ("image", "img", "picture", "photo", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp")
_BATCH = 16  # rows in memory per process that reads pictures


def picture_column(file: "pq.ParquetFile") -> str | None:
    """The column of pictures. None if there is none, or if it has neither bytes nor paths.

    Raises:
        ValueError: several columns have pictures, and none is called image.
    """
    schema = file.schema_arrow
    columns = [field.name for field in schema if _has_bytes(field.type)]
    columns = columns or [name for name in BINARY_NAMES if name in schema.names and _is_binary(schema.field(name).type)]
    if len(columns) > 1 and "image" not in columns:
        raise ValueError(f"expected one column of pictures, or one of them called image; got {', '.join(columns)}")
    if not columns:
        return None
    column = "image" if "image" in columns else columns[0]
    return None if _no_bytes(file, column) and not has_path(schema.field(column).type) else column


def picture_entries(file: "pq.ParquetFile", path: Path, column: str, captions: tuple[str, ...]) -> Iterator[Entry]:
    """One entry per row; pictures are not read. If no row has bytes, entries refer to the files at the paths.

    Keys are from the column `key`, else the picture's path. `#` and the row number from 0 are appended if there are
    captions or duplicate paths. Without a path, the key is the table's name, `/` and the row number.
    """
    schema = file.schema_arrow
    paths = has_path(schema.field(column).type)
    others = [name for name in schema.names if name in (*captions, "key") and name != column]
    numbered = bool(set(captions) & set(others)) or (
        paths and "key" not in others and _has_duplicate_paths(file, column)
    )
    outside = _no_bytes(file, column)
    wanted = [*others, *([f"{column}.path"] if paths else [])]
    for number, row in enumerate(_rows(file, wanted)):
        own, key = (row.get(column) or {}).get("path"), row.get("key")
        if key is not None and key != "":
            name = text_of(key)
        elif own:
            name = f"{text_of(own)}#{number}" if numbered else text_of(own)
        else:
            name = f"{text_of(path.name)}/{number}"
        text = next((row[caption] for caption in captions if row.get(caption) is not None), None)
        wrong = wrong_caption(text)
        error = None if wrong is None else f"row {number}: {wrong}"
        text = None if wrong else text
        file_of, row_of = (own, None) if outside and own else (path.name, number)
        yield Entry(name, file_of, row_of, text=text, error=error)


def has_path(kind: "pa.DataType") -> bool:
    """True if the type is a struct with a path."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(part.name == "path" and is_text(part.type) for part in kind)


def is_text(kind: "pa.DataType") -> bool:
    """True if the type is a string, or a dictionary of strings."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in ("string", "large_string", "string_view")


def footer_hash(path: Path) -> str:
    """The SHA-256 of a Parquet file's footer, which has the offsets and sizes of all column chunks."""
    import hashlib

    with open_regular(path) as file:
        size = file.seek(-8, io.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read(length)).hexdigest()


@dataclass(frozen=True)
class Pictures:
    """Reads the picture of one row: its bytes, or if they are null, the file at its path below the root."""

    table: Path
    root: Path

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        """The image's path, and its content if that is not the file at the path."""
        assert entry.path is not None
        if entry.offset is None:
            return whole_file(joined(self.root, entry.path))
        stat = self.table.stat()
        content, path = _cursor(self.table, (stat.st_size, stat.st_mtime)).read(entry.offset)
        if content is not None and len(content) > PICTURE_BYTES:
            raise ValueError(
                f"expected a picture of at most {PICTURE_BYTES:,} bytes; row {entry.offset} has {len(content):,}"
            )
        if content is not None:
            return self.table / str(entry.offset), io.BytesIO(content)
        if not path:
            raise ValueError(f"expected a picture in row {entry.offset}; got none")
        return whole_file(joined(self.root, path))


class _Cursor:
    """A forward reader of a table's pictures. Only a few rows are in memory."""

    def __init__(self, path: Path) -> None:
        import numpy as np
        import pyarrow.parquet as pq

        content = open_regular(path)
        if not is_remote(path):
            content.close()
        # Without a buffer size, the pictures of a whole row group would be in memory.
        self._file = pq.ParquetFile(
            content if is_remote(path) else path,
            memory_map=not is_remote(path), buffer_size=2**20, pre_buffer=False, page_checksum_verification=True,
        )  # fmt: skip
        column = picture_column(self._file)
        if column is None:
            raise ValueError(f"the table has changed since the job was planned: {path} has no column of pictures")
        self._column, metadata = column, self._file.metadata
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        self._group, self._first, self._lock = -1, 0, threading.Lock()
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = ()

    def read(self, row: int) -> tuple[bytes | None, str | None]:
        """The bytes and the path of a row."""
        if not 0 <= row < self._starts[-1]:
            raise ValueError(f"the table has changed since the job was planned: it has no row {row}")
        with self._lock:
            group = int(self._starts.searchsorted(row, "right")) - 1
            if group != self._group or row < self._first:
                self._group, self._first, self._batch = group, int(self._starts[group]), ()
                self._batches = self._file.iter_batches(_BATCH, [group], [self._column], use_threads=False)
            try:
                while row >= self._first + len(self._batch):
                    self._first += len(self._batch)
                    self._batch = next(self._batches).column(0)
                value = self._batch[row - self._first].as_py()
            except BaseException:
                self._group = -1
                raise
        return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


@functools.lru_cache(maxsize=1)
def _cursor(path: Path, stamp: tuple[Any, Any]) -> _Cursor:
    return _Cursor(path)


def _rows(file: "pq.ParquetFile", columns: list[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(file.metadata.num_rows))
        return
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _has_duplicate_paths(file: "pq.ParquetFile", column: str) -> bool:
    """True if two rows have the same path. Compares hashes: 8 bytes per row in memory, and a collision counts."""
    from array import array

    import numpy as np

    paths = ((row[column] or {}).get("path") for row in _rows(file, [f"{column}.path"]))
    hashes = np.sort(np.frombuffer(array("q", (hash(path) for path in paths if path)) or array("q", [0]), np.int64))
    return bool((hashes[1:] == hashes[:-1]).any())


def _has_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(part.name == "bytes" and _is_binary(part.type) for part in kind)


def _is_binary(kind: "pa.DataType") -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _no_bytes(file: "pq.ParquetFile", column: str) -> bool:
    """True if no row has bytes, according to the file's statistics."""
    import pyarrow as pa

    metadata = file.metadata
    leaf = f"{column}.bytes" if pa.types.is_struct(file.schema_arrow.field(column).type) else column
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        for number in range(rows.num_columns):
            chunk = rows.column(number)
            if chunk.path_in_schema == leaf:
                known = chunk.statistics is not None and chunk.statistics.has_null_count
                if not known or chunk.statistics.null_count < rows.num_rows:
                    return False
    return bool(metadata.num_rows > 0)
