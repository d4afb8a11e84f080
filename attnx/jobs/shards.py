"""Parquet shards of maps. A file under its final name is complete, and its checksums are verified when it is read.

Columns: see `attnx.jobs.packing.Format`. The schema's metadata has the job's settings as JSON under `attnx`. Any
Parquet reader can read the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnx.files import open_regular, replacing
from attnx.jobs.seal import check_seal, chunk_crc, chunk_places, seal
from attnx.jobs.tensors import check_tensors, join, split, tensors_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["SETTINGS", "DamagedError", "Part", "part_name", "parts", "read_part", "set_aside", "strays", "write_part"]

SETTINGS = b"attnx"
_PLACE = b"attnx.place"
_ROWS_PER_GROUP = 256
_GROUP_BYTES = 4 * 2**20


class DamagedError(ValueError):
    """A file of a job is damaged. The message names the file."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged: {why}")
        self.path, self.why = path, why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.why)


def part_name(shard: int) -> str:
    """The name of a shard's file."""
    return f"part-{shard:05d}.parquet"


def parts(out: Path) -> list[Path]:
    """The complete shards in a folder, sorted by number: sorted by name, part-100000 would precede part-99999."""
    with os.scandir(out) as entries:
        numbers = [_number(entry.name) for entry in entries if entry.is_file()]
    return [out / part_name(number) for number in sorted(number for number in numbers if number is not None)]


def strays(out: Path, shards: int | None = None) -> list[Path]:
    """Entries of a folder that match `part-*.parquet` but are not shards, or not among the first `shards` shards."""

    def is_stray(entry: os.DirEntry[str]) -> bool:
        number = _number(entry.name)
        return number is None or (shards is not None and number >= shards) or not entry.is_file()

    with os.scandir(out) as entries:
        named = (entry for entry in entries if entry.name.startswith("part-") and entry.name.endswith(".parquet"))
        return sorted(out / entry.name for entry in named if is_stray(entry))


def _number(name: str) -> int | None:
    """The shard number in a file name, else None."""
    match = re.fullmatch(r"part-([0-9]{5,18})\.parquet", name)
    return int(match[1]) if match and part_name(int(match[1])) == name else None


class Part:
    """A shard's file. The constructor checks the footer; each column chunk is checked when it is read.

    Attributes:
        rows, errors: number of rows, and of rows with an error.
        settings: the settings that the maps were made with.
        place: the shard's number, the SHA-256 of the job's manifest, and the size in bytes and the CRC-32 of the
            safetensors file if there is one.

    Raises:
        DamagedError: the file is damaged.
        OSError: the file can't be read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        open_regular(path).close()
        # The file stays open because it may be replaced while it is read. Forked processes share the file position,
        # so reads never depend on it.
        self._handle = pa.OSFile(str(path))
        try:
            self._checksums, data = check_seal(self._handle)
            self._file = pq.ParquetFile(self._handle, page_checksum_verification=True)
            self.metadata: pq.FileMetaData = self._file.metadata
            self.schema: pa.Schema = self.metadata.schema.to_arrow_schema()
            metadata = self.schema.metadata or {}
            self.settings: dict[str, Any] = json.loads(metadata[SETTINGS])
            self.place: dict[str, Any] = json.loads(metadata.get(_PLACE, b"{}"))
            self.rows: int = self.metadata.num_rows
            self.errors: int = self.rows - sum(
                self.metadata.row_group(group).column(self._leaf("error")).statistics.null_count
                for group in range(self.groups)
            )
            chunks = self.groups * self.metadata.num_columns
            if len(self._checksums) != chunks:
                raise ValueError(f"expected {chunks} checksums, one per column chunk; got {len(self._checksums)}")
            self._places = chunk_places(self.metadata, data)
        except (ValueError, KeyError, AttributeError, RecursionError, struct.error, pa.ArrowException) as error:
            self._handle.close()
            raise DamagedError(path, str(error) or type(error).__name__) from error
        self._checked: set[tuple[int, int]] = set()

    @property
    def groups(self) -> int:
        """The number of row groups."""
        return int(self.metadata.num_row_groups)

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.schema.names)

    def rows_of(self, group: int) -> int:
        """The number of rows in a row group."""
        return int(self.metadata.row_group(group).num_rows)

    def read(self, group: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """A row group, or some of its columns.

        Raises:
            DamagedError: the data is damaged.
        """
        import pyarrow as pa

        batches = self._read([group], columns).combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], self.schema)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The row groups, in order."""
        return (self.read(group, columns) for group in range(self.groups))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows. Raises DamagedError like `read`."""
        return self._read(range(self.groups), columns)

    def check_place(self, shard: int, rows: int, manifest: str) -> None:
        """Check the shard's number, its number of rows, and the SHA-256 of the job's manifest.

        Raises:
            DamagedError: the file belongs to another shard or job.
        """
        actual = self.place.get("shard"), self.rows, self.place.get("manifest")
        for name, got, expected in zip(("shard", "rows", "manifest"), actual, (shard, rows, manifest), strict=True):
            if got != expected:
                raise DamagedError(self.path, f"expected {name} {expected}; got {got}")

    def check(self, everything: bool = False) -> None:
        """Check the size of the safetensors file, if there is one. With `everything`, read and check both files.

        Raises:
            DamagedError: one of the files is damaged.
        """
        has_tensors = "tensor" in self.columns
        if everything:
            for group in range(self.groups):
                self._check(group, range(self.metadata.num_columns))
        if has_tensors:
            try:
                check_tensors(
                    tensors_of(self.path), self.place["tensors"], self.place["tensors_crc32"] if everything else None
                )
            except (ValueError, KeyError, OSError) as error:
                raise DamagedError(tensors_of(self.path), str(error)) from error

    def _read(self, groups: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
        import pyarrow as pa

        names = self.columns if columns is None else list(columns)
        leaves = [self._leaf(name) for name in names]
        for group in groups:
            self._check(group, leaves)
        try:
            return self._file.read_row_groups(list(groups), names, use_threads=False)
        except (pa.ArrowException, ValueError) as error:
            raise DamagedError(self.path, str(error)) from error

    def _leaf(self, name: str) -> int:
        # Every column, also of lists, has exactly one leaf here, so the leaf number is the field number.
        return int(self.schema.get_field_index(name))

    def _check(self, group: int, leaves: Sequence[int]) -> None:
        for leaf in leaves:
            if (group, leaf) not in self._checked:
                chunk = group * self.metadata.num_columns + leaf
                if chunk_crc(self._handle, *self._places[chunk]) != self._checksums[chunk]:
                    message = f"the checksum of column {self.schema.names[leaf]} of row group {group} is wrong"
                    raise DamagedError(self.path, message)
                self._checked.add((group, leaf))


def write_part(
    table: pa.Table, target: Path, settings: dict[str, Any], tensors: bool = False, place: dict[str, Any] | None = None
) -> None:
    """Write a shard atomically.

    Args:
        table: the rows, as of `Format.table`.
        target: path of the Parquet file.
        settings: the job's settings, for JSON.
        tensors: store the maps in a safetensors file with the same stem; it is written first.
        place: {"shard": number, "manifest": SHA-256 of the job's manifest}.
    """
    import pyarrow.parquet as pq

    place = dict(place or {})
    if tensors:
        table, content = split(table)
        place["tensors"], place["tensors_crc32"] = len(content), zlib.crc32(content)
        with replacing(tensors_of(target)) as path:
            path.write_bytes(content)
    # To read a row, its whole group is read, so groups have at most a few megabytes.
    rows = max(1, min(_ROWS_PER_GROUP, len(table) * _GROUP_BYTES // max(table.nbytes, 1)))
    with replacing(target) as path:
        # BYTE_STREAM_SPLIT would be smaller, but DuckDB fails on it for float16.
        pq.write_table(
            table.replace_schema_metadata({SETTINGS: json.dumps(settings), _PLACE: json.dumps(place)}), path,
            row_group_size=rows, compression="zstd", use_dictionary=["shape.list.element", "error"],
            use_byte_stream_split=False, write_statistics=["key", "error"], write_page_checksum=True,
        )  # fmt: skip
        seal(path)


def read_part(path: Path) -> pa.Table:
    """The table that was passed to `write_part`."""
    part = Part(path)
    table = part.table().replace_schema_metadata(part.schema.metadata)
    return join(table, tensors_of(path)) if "tensor" in part.columns else table


def set_aside(path: Path) -> Path:
    """Move a shard's files into the folder part-N.damaged, and return that folder."""
    folder = path.with_suffix(".damaged")
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif os.path.lexists(folder):
        folder.unlink()
    folder.mkdir()
    # The Parquet file moves first: without it, the shard does not exist.
    for each in (path, tensors_of(path)):
        if os.path.lexists(each):
            each.replace(folder / each.name)
    return folder
