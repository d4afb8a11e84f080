"""Storage of maps that are too large for Parquet: a safetensors file per shard.

`part-00007.safetensors` is written before `part-00007.parquet`, which has the columns `tensor` (the tensor's name) and
`tensor_crc32` instead of `map`. So a shard is complete when its Parquet file exists.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attnx.files import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["check_tensors", "join", "read_tensor", "split", "tensors_of"]


def tensors_of(shard: Path) -> Path:
    """The path of a shard's safetensors file."""
    return shard.with_suffix(".safetensors")


def split(table: pa.Table) -> tuple[pa.Table, bytes]:
    """The table with tensor and tensor_crc32 instead of map, and the content of the safetensors file."""
    import pyarrow as pa
    from safetensors.numpy import save

    maps, shapes = table.column("map"), table.column("shape").to_pylist()
    names = [None if shape is None else str(i) for i, shape in enumerate(shapes)]
    tensors = {
        name: maps[i].values.to_numpy(zero_copy_only=False).reshape(shapes[i])
        for i, name in enumerate(names)
        if name is not None
    }
    checksums = [None if name is None else _crc(tensors[name]) for name in names]
    place = table.column_names.index("map")
    table = table.set_column(place, "tensor", pa.array(names, pa.string()))
    return table.add_column(place + 1, "tensor_crc32", pa.array(checksums, pa.uint32())), save(tensors)


def join(table: pa.Table, path: Path) -> pa.Table:
    """The table with maps, the inverse of `split`.

    Raises:
        ValueError: a tensor is damaged.
    """
    import pyarrow as pa

    rows = table.select(["tensor", "tensor_crc32"]).to_pylist()
    maps = [None if row["tensor"] is None else read_tensor(path, **row).reshape(-1) for row in rows]
    place = table.column_names.index("tensor")
    return table.remove_column(place + 1).set_column(place, "map", pa.array(maps))


def read_tensor(path: Path, tensor: str, tensor_crc32: int) -> np.ndarray:
    """A stored tensor.

    Raises:
        ValueError: the file or the tensor is damaged.
        OSError: the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    # safe_open would block on a pipe.
    open_regular(path).close()
    try:
        with safe_open(path, "numpy") as file:
            values: np.ndarray = file.get_tensor(tensor)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if _crc(values) != tensor_crc32:
        raise ValueError(f"{path} is damaged: the checksum of tensor {tensor} is wrong")
    return values


def check_tensors(path: Path, size: int, crc: int | None = None) -> None:
    """Check the size of a file in bytes, and its CRC-32 if one is given.

    Raises:
        ValueError: the file is damaged.
        OSError: the file can't be read.
    """
    with open_regular(path) as file:
        actual = file.seek(0, 2)
        if actual != size:
            raise ValueError(f"expected {size:,} bytes; got {actual:,}")
        if crc is not None:
            file.seek(0)
            actual_crc = 0
            while block := file.read(2**20):
                actual_crc = zlib.crc32(block, actual_crc)
            if actual_crc != crc:
                raise ValueError("its checksum is wrong")


def _crc(values: np.ndarray) -> int:
    """The CRC-32 of an array's dtype, shape and bytes."""
    kind = f"{values.dtype.str} {values.shape}".encode()
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, zlib.crc32(kind))
