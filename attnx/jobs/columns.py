"""The columns of a job's shards, declared once: the fields of `MapRow`.

To add a column, add a field with its type, and set it in a task (`attnx.jobs.tasks`) or in the worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["MapRow", "schema"]


def _stored(arrow: str, captions: bool = False) -> dict[str, Any]:
    """The metadata of a field: its Arrow type, "list<...>" included. captions: only in jobs of captions."""
    return {"arrow": arrow, "captions": captions}


@dataclass(frozen=True, eq=False)
class MapRow:
    """The result of one image, or of one image and its caption.

    Attributes:
        key: the row's key.
        text: the caption; None without one.
        map: float32 map; None if there is an error. It is stored as three columns: map (values), shape and scale.
        width, height: size of the upright picture in pixels; None if it could not be read.
        crop: the part of the picture that the map covers, (left, top, right, bottom) in pixels.
        error: the error message; None if there is a map.
        tokens: the word pieces of the caption, one per map.
        word_of: the word number of each token; None for [CLS] and [SEP].
        score: the matching logit.
        cut: number of words at the end that exceed the model's length.
    """

    key: str = field(metadata=_stored("string"))
    text: str | None = field(default=None, metadata=_stored("string"))
    map: np.ndarray | None = field(default=None, metadata=_stored("map"))
    width: int | None = field(default=None, metadata=_stored("int32"))
    height: int | None = field(default=None, metadata=_stored("int32"))
    crop: tuple[float, ...] | None = field(default=None, metadata=_stored("list<float32>"))
    error: str | None = field(default=None, metadata=_stored("string"))
    tokens: tuple[str, ...] | None = field(default=None, metadata=_stored("list<string>", captions=True))
    word_of: tuple[int | None, ...] | None = field(default=None, metadata=_stored("list<int32>", captions=True))
    score: float | None = field(default=None, metadata=_stored("float32", captions=True))
    cut: int | None = field(default=None, metadata=_stored("int32", captions=True))


def schema(dtype: str, captions: bool) -> pa.Schema:
    """The schema of a shard whose maps are stored as `dtype`. captions: with the columns of captions."""
    import pyarrow as pa

    columns: dict[str, pa.DataType] = {}
    for each in fields(MapRow):
        kind = each.metadata["arrow"]
        if kind == "map":
            columns |= {"map": pa.list_(_type(dtype)), "shape": pa.list_(pa.int32()), "scale": pa.float32()}
        elif captions or not each.metadata["captions"]:
            columns[each.name] = _type(kind)
    return pa.schema(columns.items())


def _type(kind: str) -> pa.DataType:
    import pyarrow as pa

    if kind.startswith("list<"):
        return pa.list_(_type(kind[5:-1]))
    found: pa.DataType = getattr(pa, kind)()
    return found
