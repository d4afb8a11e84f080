"""The columns of a job's shards, declared once: the fields of `MapRow`.

To add a column, add a field with its type, and set it in a task (`attnx.jobs.tasks`) or in the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx.images.inline import titled_heat

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["STATS", "MapRow", "schema"]


STATS = ("entropy", "distance", "max", "mass", "importance")


def _stored(arrow: str, only: str = "") -> dict[str, Any]:
    """The metadata of a field: its Arrow type, "list<...>" included.

    only: the jobs that have the column: "maps", "captions" (of captions), "stats" (of probes), or "" for all.
    """
    return {"arrow": arrow, "only": only}


@dataclass(frozen=True, eq=False, repr=False)
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
        words: the W words of the caption. If the shard has none, `attnx.open` joins the pieces; a word that is not in
            the vocabulary is then [UNK].
        entropy, distance, max, mass, importance: the mean of a statistic of each head, float32 [T], layer by layer; see
            `attnx.methods.probes.head_means`.
        sums_pieces: the map of a word is the sum over its pieces (LAVT), not their mean. `attnx.open` sets it by the
            settings of the job; it is no column.
    """

    key: str = field(metadata=_stored("string"))
    text: str | None = field(default=None, metadata=_stored("string"))
    map: np.ndarray | None = field(default=None, metadata=_stored("map", "maps"))
    width: int | None = field(default=None, metadata=_stored("int32"))
    height: int | None = field(default=None, metadata=_stored("int32"))
    crop: tuple[float, ...] | None = field(default=None, metadata=_stored("list<float32>"))
    error: str | None = field(default=None, metadata=_stored("string"))
    tokens: tuple[str, ...] | None = field(default=None, metadata=_stored("list<string>", "captions"))
    word_of: tuple[int | None, ...] | None = field(default=None, metadata=_stored("list<int32>", "captions"))
    score: float | None = field(default=None, metadata=_stored("float32", "captions"))
    cut: int | None = field(default=None, metadata=_stored("int32", "captions"))
    words: tuple[str, ...] | None = field(default=None, metadata=_stored("list<string>", "captions"))
    entropy: np.ndarray | None = field(default=None, metadata=_stored("list<float32>", "stats"))
    distance: np.ndarray | None = field(default=None, metadata=_stored("list<float32>", "stats"))
    max: np.ndarray | None = field(default=None, metadata=_stored("list<float32>", "stats"))
    mass: np.ndarray | None = field(default=None, metadata=_stored("list<float32>", "stats"))
    importance: np.ndarray | None = field(default=None, metadata=_stored("list<float32>", "stats"))
    sums_pieces: bool = False

    def __repr__(self) -> str:
        found = "no map" if self.map is None else list(self.map.shape)
        return f"MapRow({self.key!r}, {f'error={self.error!r:.80}' if self.error else found})"

    def _repr_html_(self) -> str:
        """The key and the maps, for notebooks; of a map with layers or heads, the mean."""
        about = escape(repr(self) if self.text is None else f"{self!r}: {self.text}")
        if self.map is None or self.map.ndim < 2 or not self.map.size:
            return f"<div>{about}</div>"
        named = zip(self.words, self.word_maps, strict=True) if self.words and self.map.ndim == 3 else ()
        drawn = [titled_heat(word, amap) for word, amap in named]
        mean = self.map.astype(np.float32).reshape(-1, *self.map.shape[-2:]).mean(0)
        return f"<div>{about}<br>{''.join(drawn or [titled_heat('', mean)])}</div>"

    @cached_property
    def word_maps(self) -> np.ndarray:
        """The maps of the words, float32 [W, h, w]: the mean over the pieces of each word (ALBEF), or the sum (LAVT).

        Raises:
            ValueError: the row has no map, or no words, which only rows of `attnx words` have.
        """
        if self.error is not None:
            raise ValueError(f"word_maps: expected a row with a map; {self.key} has the error: {self.error}")
        if self.words is None or self.word_of is None:
            raise ValueError(f"word_maps: expected a row of attnx words; {self.key} has no words")
        if self.map is None:
            raise ValueError(f"word_maps: expected a row with a map; {self.key} has none")
        maps, owners = self.map.astype(np.float32), self.word_of
        pieces = [maps[[t for t, word in enumerate(owners) if word == w]] for w in range(len(self.words))]
        return np.stack([own.sum(0) if self.sums_pieces else own.mean(0) for own in pieces])


def schema(dtype: str, captions: bool, stats: Sequence[str] = ()) -> pa.Schema:
    """The schema of a shard.

    Args:
        dtype: of the stored maps.
        captions: with the columns of captions.
        stats: names of the columns of statistics; the shard then has no maps.
    """
    import pyarrow as pa

    columns: dict[str, pa.DataType] = {}
    for each in fields(MapRow):
        has = {"": True, "maps": not stats, "captions": captions, "stats": each.name in stats}
        if not each.metadata or not has[each.metadata["only"]]:
            continue
        if each.metadata["arrow"] == "map":
            columns |= {"map": pa.list_(_type(dtype)), "shape": pa.list_(pa.int32()), "scale": pa.float32()}
        else:
            columns[each.name] = _type(each.metadata["arrow"])
    return pa.schema(columns.items())


def _type(kind: str) -> pa.DataType:
    import pyarrow as pa

    if kind.startswith("list<"):
        return pa.list_(_type(kind[5:-1]))
    found: pa.DataType = getattr(pa, kind)()
    return found
