"""The seal of a Parquet file: checksums between the last page and the footer, which Parquet readers skip.

It has a CRC-32 of every column chunk with the bytes up to the next one, and a SHA-256 of these checksums, of the footer
and of the size of the data. So a single flipped bit is detected when it is read.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["check_seal", "chunk_crc", "chunk_places", "seal"]

_SEAL = struct.Struct("<32sI8s")  # SHA-256, number of CRCs before it, magic number
_SEAL_MAGIC = b"ATTNXCRC"
_END = struct.Struct("<I4s")  # length of the footer, Parquet's magic number
_BLOCK = 2**20


def seal(path: Path) -> None:
    """Insert the seal between the data and the footer of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    with pa.OSFile(str(path)) as written:
        size = written.size()
        length, _ = _END.unpack(written.read_at(_END.size, size - _END.size))
        data = size - _END.size - length
        footer = written.read_at(size - data, data)
        checksums = [chunk_crc(written, *place) for place in chunk_places(metadata, data)]
    packed = struct.pack(f"<{len(checksums)}I", *checksums)
    with path.open("rb+") as file:
        file.seek(data)
        file.write(packed + _SEAL.pack(_digest(data, packed, footer), len(checksums), _SEAL_MAGIC) + footer)


def check_seal(file: pa.NativeFile) -> tuple[tuple[int, ...], int]:
    """The checksums of the column chunks, and the size in bytes of the data before the seal.

    Raises:
        ValueError: the file has no seal, or the seal or the footer is damaged.
    """
    size = file.size()
    least = len(b"PAR1") + _SEAL.size + _END.size
    if size < least:
        raise ValueError(f"expected at least {least} bytes; got {size}")
    length, magic = _END.unpack(file.read_at(_END.size, size - _END.size))
    if magic != b"PAR1":
        raise ValueError("expected a Parquet file; it does not end with PAR1")
    start = size - _END.size - length - _SEAL.size
    if start < 0:
        raise ValueError(f"the file is smaller than its footer of {length:,} bytes")
    digest, count, magic = _SEAL.unpack(file.read_at(_SEAL.size, start))
    data = start - 4 * count
    if magic != _SEAL_MAGIC or data < 0:
        raise ValueError("the checksums before its footer are missing; an older attnx writes none")
    packed = file.read_at(4 * count, data)
    footer = file.read_at(size - start - _SEAL.size, start + _SEAL.size)
    if _digest(data, packed, footer) != digest:
        raise ValueError("the checksum of its footer is wrong")
    return struct.unpack(f"<{count}I", packed), data


def _digest(data: int, packed: bytes, footer: bytes) -> bytes:
    return hashlib.sha256(data.to_bytes(8, "little") + packed + footer).digest()


def chunk_places(metadata: pq.FileMetaData, data: int) -> list[tuple[int, int]]:
    """(start, size) in bytes of each column chunk, up to the start of the next one. The first starts at 0."""
    columns = (
        metadata.row_group(group).column(leaf)
        for group in range(metadata.num_row_groups)
        for leaf in range(metadata.num_columns)
    )
    starts = [each.dictionary_page_offset if each.has_dictionary_page else each.data_page_offset for each in columns]
    return [(start, stop - start) for start, stop in pairwise([0, *starts[1:], data])]


def chunk_crc(file: pa.NativeFile, start: int, size: int) -> int:
    """The CRC-32 of a part of a file. If the file ends early, only the existing bytes count."""
    crc = 0
    for at in range(start, start + size, _BLOCK):
        crc = zlib.crc32(file.read_at(min(_BLOCK, start + size - at), at), crc)
    return crc
