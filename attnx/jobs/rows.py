"""Rows of shards, as they are read."""

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
    """One image's result. `map`: of the shape that was stored, or None, and then `error` says why; float32,
    times its scale.

    `width`, `height`: of the upright picture, in pixels; None where the image could not be read.
    `text`: the caption, as it was given; `tokens`: its word pieces, one for each of the maps; `word_of`: for each the
    number of the word it is of, None for [CLS] and [SEP]; `score`: the logit of a match; `cut`: how many words at the
    end had no room. None where there are none.
    `crop`: the part of the picture that the map covers (left, top, right, bottom), in its pixels.
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
    """The rows of a part of a shard."""
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
    """The complete shards of a folder, which has at least one. shards: the number of its job's, if that is known.

    Raises:
        FileNotFoundError: it has none.
        DamagedError: something else has the name of a shard.
    """
    found, odd = (parts(out), strays(out, shards)) if out.is_dir() else ([], [])
    if odd:
        of = "" if shards is None else f", of {shards} shards"
        raise DamagedError(odd[0], f"expected a regular file with the name of a shard, such as part-00003.parquet{of}")
    if not found:
        raise FileNotFoundError(f"out: expected a folder with part-*.parquet files, got {out}")
    return found
