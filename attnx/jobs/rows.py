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


def rows_of(batch: pa.RecordBatch, shard: Path, settings: dict[str, Any]) -> Iterator[MapRow]:
    """The rows of a record batch of a shard. settings: those of the job."""
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
            name: tuple(row[name]) for name in ("tokens", "word_of", "crop", "words") if row.get(name) is not None
        }
        if "words" not in lists and lists.keys() >= {"tokens", "word_of"}:
            lists["words"] = _joined(lists["tokens"], lists["word_of"])
        stats = {name: np.array(row[name], np.float32) for name in STATS if row.get(name) is not None}
        # Only LAVT has stages. Its word pieces are keys, whose weights are added.
        yield MapRow(map=amap, sums_pieces="stage" in settings, **{**row, **lists, **stats})


def _joined(tokens: tuple[str, ...], word_of: tuple[int | None, ...]) -> tuple[str, ...]:
    """The words of word pieces, for shards without the column `words`."""
    words = [""] * (max((word for word in word_of if word is not None), default=-1) + 1)
    for token, word in zip(tokens, word_of, strict=True):
        if word is not None:
            words[word] += token.removeprefix("##")
    return tuple(words)


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
