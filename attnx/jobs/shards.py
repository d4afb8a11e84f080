"""Parquet shards of maps: a file under its final name is complete, and it is checked before its rows are believed.

Columns: see `attnx.jobs.packing.Format`. The job's settings are JSON in the schema's metadata under `attnx`. Any
Parquet reader reads the files.

Between the last page and the footer lies a seal that Parquet readers skip: a CRC-32 of every column chunk and of what
lies between it and the next, and a SHA-256 of these, of the footer and of the size of the data. So one flipped bit of a
file is found where it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnx.files import open_regular, replacing
from attnx.jobs.tensors import check_tensors, join, split, tensors_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["SETTINGS", "DamagedError", "Part", "part_name", "parts", "read_part", "set_aside", "strays", "write_part"]

SETTINGS = b"attnx"
_PLACE = b"attnx.place"
_ROWS_PER_GROUP = 256
_GROUP_BYTES = 4 * 2**20
_SEAL = struct.Struct("<32sI8s")  # SHA-256, how many CRCs stand before it, the magic number
_SEAL_MAGIC = b"ATTNXCRC"
_END = struct.Struct("<I4s")  # length of the footer, Parquet's magic number
_BLOCK = 2**20


class DamagedError(ValueError):
    """A file of a job is not as it was written. The message names the file."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged: {why}")
        self.path, self.why = path, why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.why)


def part_name(shard: int) -> str:
    """The name of a shard's file."""
    return f"part-{shard:05d}.parquet"


def parts(out: Path) -> list[Path]:
    """The complete shards in a folder, by number: in order of names, part-100000 would come before part-99999."""
    with os.scandir(out) as entries:
        numbers = [_number(entry.name) for entry in entries if entry.is_file()]
    return [out / part_name(number) for number in sorted(number for number in numbers if number is not None)]


def strays(out: Path, shards: int | None = None) -> list[Path]:
    """Entries of a folder that readers of `part-*.parquet` take for shards, and that are none of the first so many."""

    def is_stray(entry: os.DirEntry[str]) -> bool:
        number = _number(entry.name)
        return number is None or (shards is not None and number >= shards) or not entry.is_file()

    with os.scandir(out) as entries:
        named = (entry for entry in entries if entry.name.startswith("part-") and entry.name.endswith(".parquet"))
        return sorted(out / entry.name for entry in named if is_stray(entry))


def _number(name: str) -> int | None:
    """The shard of which a file has the name."""
    match = re.fullmatch(r"part-([0-9]{5,18})\.parquet", name)
    return int(match[1]) if match and part_name(int(match[1])) == name else None


class Part:
    """A shard's file. Its footer is checked here; each column chunk is checked when it is read.

    Attributes:
        rows, errors: how many rows it has, and how many of them have an error.
        settings: what its maps were made with.
        place: the shard's number, the SHA-256 of its job's manifest, and of the file of tensors beside it the
            size in bytes and the CRC-32.

    Raises:
        DamagedError: the file is not as it was written.
        OSError: it can't be read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        open_regular(path).close()
        # Kept open: the file may be replaced while it is read. Forked processes share its position, which is not used.
        self._handle = pa.OSFile(str(path))
        try:
            self._checksums, data = _check_seal(self._handle)
            self._file = pq.ParquetFile(self._handle, page_checksum_verification=True)
            self.metadata: pq.FileMetaData = self._file.metadata
            self.schema: pa.Schema = self.metadata.schema.to_arrow_schema()
            known = self.schema.metadata or {}
            self.settings: dict[str, Any] = json.loads(known[SETTINGS])
            self.place: dict[str, Any] = json.loads(known.get(_PLACE, b"{}"))
            self.rows: int = self.metadata.num_rows
            self.errors: int = self.rows - sum(
                self.metadata.row_group(group).column(self._leaf("error")).statistics.null_count
                for group in range(self.groups)
            )
            chunks = self.groups * self.metadata.num_columns
            if len(self._checksums) != chunks:
                raise ValueError(f"{len(self._checksums)} checksums of {chunks} column chunks")
            self._places = _places(self.metadata, data)
        except (ValueError, KeyError, AttributeError, RecursionError, struct.error, pa.ArrowException) as error:
            self._handle.close()
            raise DamagedError(path, str(error) or type(error).__name__) from error
        self._checked: set[tuple[int, int]] = set()

    @property
    def groups(self) -> int:
        """How many row groups there are."""
        return int(self.metadata.num_row_groups)

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.schema.names)

    def rows_of(self, group: int) -> int:
        """How many rows a row group has."""
        return int(self.metadata.row_group(group).num_rows)

    def read(self, group: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """A row group, or some columns of it.

        Raises:
            DamagedError: they are not as they were written.
        """
        import pyarrow as pa

        batches = self._read([group], columns).combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], self.schema)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The row groups, in order."""
        return (self.read(group, columns) for group in range(self.groups))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows. Raises DamagedError as `read` does."""
        return self._read(range(self.groups), columns)

    def check_place(self, shard: int, rows: int, manifest: str) -> None:
        """Checks that it is a shard of a job: its number, its rows, and the SHA-256 of the job's manifest.

        Raises:
            DamagedError: it is another one.
        """
        found = self.place.get("shard"), self.rows, self.place.get("manifest")
        for what, got, wanted in zip(("shard", "rows", "manifest"), found, (shard, rows, manifest), strict=True):
            if got != wanted:
                raise DamagedError(self.path, f"expected {what} {wanted}; got {got}")

    def check(self, everything: bool = False) -> None:
        """Checks that the tensors beside it are there in their size; with `everything` reads all of both files.

        Raises:
            DamagedError: one of the files is not as it was written.
        """
        beside = "tensor" in self.columns
        if everything:
            for group in range(self.groups):
                self._check(group, range(self.metadata.num_columns))
        if beside:
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
        # Columns of lists are one leaf each, as here: a leaf's number is its field's.
        return int(self.schema.get_field_index(name))

    def _check(self, group: int, leaves: Sequence[int]) -> None:
        for leaf in leaves:
            if (group, leaf) not in self._checked:
                chunk = group * self.metadata.num_columns + leaf
                if _crc(self._handle, *self._places[chunk]) != self._checksums[chunk]:
                    told = f"the checksum of column {self.schema.names[leaf]} of row group {group} is wrong"
                    raise DamagedError(self.path, told)
                self._checked.add((group, leaf))


def write_part(
    table: pa.Table, target: Path, settings: dict[str, Any], tensors: bool = False, place: dict[str, Any] | None = None
) -> None:
    """Writes a shard, whole or not at all; with `tensors` its maps in a safetensors file beside it, first.

    place: {"shard": its number, "manifest": the SHA-256 of its job's manifest}.
    """
    import pyarrow.parquet as pq

    place = dict(place or {})
    if tensors:
        table, content = split(table)
        place["tensors"], place["tensors_crc32"] = len(content), zlib.crc32(content)
        with replacing(tensors_of(target)) as path:
            path.write_bytes(content)
    # A row is read with its group, which should be no more than a few megabytes.
    rows = max(1, min(_ROWS_PER_GROUP, len(table) * _GROUP_BYTES // max(table.nbytes, 1)))
    with replacing(target) as path:
        # BYTE_STREAM_SPLIT would be smaller, but DuckDB fails on it for float16.
        pq.write_table(
            table.replace_schema_metadata({SETTINGS: json.dumps(settings), _PLACE: json.dumps(place)}), path,
            row_group_size=rows, compression="zstd", use_dictionary=["shape.list.element", "error"],
            use_byte_stream_split=False, write_statistics=["key", "error"], write_page_checksum=True,
        )  # fmt: skip
        _seal(path)


def read_part(path: Path) -> pa.Table:
    """A shard as it was given to `write_part`."""
    part = Part(path)
    table = part.table().replace_schema_metadata(part.schema.metadata)
    return join(table, tensors_of(path)) if "tensor" in part.columns else table


def set_aside(path: Path) -> Path:
    """Moves a shard's files into the folder part-N.damaged beside it, which is returned."""
    folder = path.with_suffix(".damaged")
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif os.path.lexists(folder):
        folder.unlink()
    folder.mkdir()
    # The Parquet file first: without it there is no shard.
    for each in (path, tensors_of(path)):
        if os.path.lexists(each):
            each.replace(folder / each.name)
    return folder


def _seal(path: Path) -> None:
    """Puts the seal between the data and the footer of a Parquet file that was just written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    with pa.OSFile(str(path)) as written:
        size = written.size()
        length, _ = _END.unpack(written.read_at(_END.size, size - _END.size))
        data = size - _END.size - length
        footer = written.read_at(size - data, data)
        checksums = [_crc(written, *place) for place in _places(metadata, data)]
    packed = struct.pack(f"<{len(checksums)}I", *checksums)
    with path.open("rb+") as file:
        file.seek(data)
        file.write(packed + _SEAL.pack(_digest(data, packed, footer), len(checksums), _SEAL_MAGIC) + footer)


def _check_seal(file: pa.NativeFile) -> tuple[tuple[int, ...], int]:
    """The checksums of a file's column chunks, and the size of the data before them and the footer.

    Raises:
        ValueError: they are not as they were written.
    """
    size = file.size()
    least = len(b"PAR1") + _SEAL.size + _END.size
    if size < least:
        raise ValueError(f"expected at least {least} bytes; got {size}")
    length, magic = _END.unpack(file.read_at(_END.size, size - _END.size))
    if magic != b"PAR1":
        raise ValueError("it does not end as Parquet files do")
    seal = size - _END.size - length - _SEAL.size
    if seal < 0:
        raise ValueError(f"it has no room for a footer of {length:,} bytes")
    digest, count, magic = _SEAL.unpack(file.read_at(_SEAL.size, seal))
    data = seal - 4 * count
    if magic != _SEAL_MAGIC or data < 0:
        raise ValueError("it has no checksums before its footer, unless an older attnx wrote it")
    packed = file.read_at(4 * count, data)
    footer = file.read_at(size - seal - _SEAL.size, seal + _SEAL.size)
    if _digest(data, packed, footer) != digest:
        raise ValueError("the checksum of its footer is wrong")
    return struct.unpack(f"<{count}I", packed), data


def _digest(data: int, packed: bytes, footer: bytes) -> bytes:
    return hashlib.sha256(data.to_bytes(8, "little") + packed + footer).digest()


def _places(metadata: pq.FileMetaData, data: int) -> list[tuple[int, int]]:
    """Where each column chunk begins in the file, and its size up to the next, in bytes; the first begins at 0."""
    columns = (
        metadata.row_group(group).column(leaf)
        for group in range(metadata.num_row_groups)
        for leaf in range(metadata.num_columns)
    )
    starts = [each.dictionary_page_offset if each.has_dictionary_page else each.data_page_offset for each in columns]
    return [(start, stop - start) for start, stop in pairwise([0, *starts[1:], data])]


def _crc(file: pa.NativeFile, start: int, size: int) -> int:
    """The CRC-32 of a part of a file; of one that ends early, of what there is."""
    crc = 0
    for at in range(start, start + size, _BLOCK):
        crc = zlib.crc32(file.read_at(min(_BLOCK, start + size - at), at), crc)
    return crc
