"""Rows that are read from shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attnx.jobs.shards import DamagedError, parts, strays
from attnx.jobs.tensors import read_tensor, tensors_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Row", "rows_of", "shards_in"]


@dataclass(frozen=True, eq=False)
class Row:
    """The result of one image or pair.

    Attributes:
        key: the row's key.
        map: float32 map multiplied by its scale; None if there is an error.
        width, height: size of the upright picture in pixels; None if it could not be read.
        error: the error message; None if there is a map.
        text: the caption; None without one.
        tokens: the word pieces of the caption, one per map.
        word_of: the word number of each token; None for [CLS] and [SEP].
        score: the matching logit.
        cut: number of words at the end that exceed the model's length.
        crop: the part of the picture that the map covers, (left, top, right, bottom) in pixels.
    """

    key: str
    map: np.ndarray | None
    width: int | None
    height: int | None
    error: str | None
    text: str | None = None
    tokens: tuple[str, ...] | None = None
    word_of: tuple[int | None, ...] | None = None
    score: float | None = None
    cut: int | None = None
    crop: tuple[float, ...] | None = None


def rows_of(batch: pa.RecordBatch, shard: Path) -> Iterator[Row]:
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
        lists = {name: tuple(row[name]) for name in ("tokens", "word_of", "crop") if row.get(name) is not None}
        yield Row(map=amap, **{**row, **lists})


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
        raise FileNotFoundError(f"out: expected a folder with part-*.parquet files, got {out}")
    return complete
