"""Rows that are read from shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx.jobs.columns import STATS, MapRow
from attnx.jobs.shards import DamagedError, parts, strays
from attnx.jobs.tensors import read_tensor, tensors_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["rows_of", "shards_in"]


def rows_of(batch: pa.RecordBatch, shard: Path) -> Iterator[MapRow]:
    """The rows of a record batch of a shard."""
    names = batch.schema.names
    if "map" in names:
        maps = batch.column("map")
        values, offsets = maps.values.to_numpy(zero_copy_only=False), maps.offsets.to_numpy()
    for i, row in enumerate(batch.select([name for name in names if name != "map"]).to_pylist()):
        shape, tensor, crc, scale = (row.pop(name, None) for name in ("shape", "tensor", "tensor_crc32", "scale"))
        amap = None
        if tensor is not None:
            amap = read_tensor(tensors_of(shard), tensor, crc)
        elif shape is not None and "map" in names:
            # A copy: a view would keep the whole batch in memory, and could not be written to.
            amap = values[offsets[i] : offsets[i + 1]].reshape(shape).copy()
        if amap is not None and scale is not None:
            amap = amap.astype(np.float32) * np.float32(scale)
        lists: dict[str, Any] = {
            name: tuple(row[name]) for name in ("tokens", "word_of", "crop") if row.get(name) is not None
        }
        stats = {name: np.array(row[name], np.float32) for name in STATS if row.get(name) is not None}
        yield MapRow(map=amap, **{**row, **lists, **stats})


def shards_in(out: Path, shards: int | None = None) -> list[Path]:
    """The complete shards of a folder, at least one. shards: the job's number of shards, if known.

    Raises:
        FileNotFoundError: the folder has no shards.
        DamagedError: another file matches `part-*.parquet`.
    """
    complete, others = (parts(out), strays(out, shards)) if out.is_dir() else ([], [])
    if others:
        count = "" if shards is None else f", of {shards} shards"
        expected = f"expected a regular file with the name of a shard, such as part-00003.parquet{count}"
        raise DamagedError(others[0], expected)
    if not complete:
        raise FileNotFoundError(f"folder: expected the output of a job, with part-*.parquet files; got {out}")
    return complete
