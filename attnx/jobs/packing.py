"""How maps are stored: their numbers in a small dtype, one scale a map that gives them back, and a shard's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnx.jobs.sources import text_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DTYPES", "STORES", "Format", "Result", "pack"]

DTYPES = ("float16", "float32", "uint8")
STORES = ("map", "rows", "full")


class Result(NamedTuple):
    """A row of a shard, with a map or an error; tokens, word_of, score and cut of a caption."""

    key: str
    text: str | None
    map: np.ndarray | None
    width: int | None
    height: int | None
    crop: tuple[float, ...] | None
    error: str | None
    tokens: tuple[str, ...] | None = None
    word_of: tuple[int | None, ...] | None = None
    score: float | None = None
    cut: int | None = None


@dataclass(frozen=True)
class Format:
    """The format of a job's shards.

    Args:
        dtype: of the stored numbers: "float16", "float32", "uint8".
        captions: with the columns tokens, word_of, score and cut.
    """

    dtype: str = "float16"
    captions: bool = False

    def schema(self) -> pa.Schema:
        """The columns."""
        import pyarrow as pa

        values = {"float16": pa.float16(), "float32": pa.float32(), "uint8": pa.uint8()}[self.dtype]
        columns = {
            "key": pa.string(), "text": pa.string(), "map": pa.list_(values), "shape": pa.list_(pa.int32()),
            "scale": pa.float32(), "width": pa.int32(), "height": pa.int32(), "crop": pa.list_(pa.float32()),
            "error": pa.string(),
        }  # fmt: skip
        if self.captions:
            columns |= {
                "tokens": pa.list_(pa.string()),
                "word_of": pa.list_(pa.int32()),
                "score": pa.float32(),
                "cut": pa.int32(),
            }
        return pa.schema(columns.items())

    def table(self, results: list[Result]) -> pa.Table:
        """The rows; a map that can't be stored becomes its row's error."""
        import pyarrow as pa

        schema = self.schema()
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        for result in results:
            row: dict[str, Any] = {**result._asdict(), "shape": None, "scale": None}
            if result.map is not None:
                try:
                    stored, row["scale"] = pack(np.asarray(result.map, np.float32), self.dtype)
                    row["map"], row["shape"] = stored.reshape(-1), stored.shape
                except ValueError as cause:
                    row["map"], row["error"] = None, str(cause)
            # It may name a file, whose name need be no valid Unicode.
            row["error"] = None if row["error"] is None else text_of(row["error"])
            for name, values in columns.items():
                values.append(row[name])
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    def concatenate(self, tables: list[pa.Table]) -> pa.Table:
        """Rows of several tables, of shards or new ones, as one shard's."""
        import pyarrow as pa

        schema = self.schema()
        return pa.concat_tables([schema.empty_table(), *(each.cast(schema) for each in tables)])


def pack(amap: np.ndarray, dtype: str) -> tuple[np.ndarray, float]:
    """What is stored of a float32 map, and its scale: map = stored * scale.

    float16: the scale is the power of two that brings the largest magnitude into 1..2, so that a map of a long sequence
    doesn't drown in subnormal numbers: within 2^-11 of each value, and 2^-25 of the largest. uint8: the largest value
    over 255, within 1/510 of it. float32: 1.

    Raises:
        ValueError: a NaN or an infinity; for uint8, a negative value.
    """
    finite = np.isfinite(amap)
    if not finite.all():
        nans = int(np.isnan(amap).sum())
        raise ValueError(
            f"the map is not finite: of {amap.size} values, {nans} are NaN, {int((~finite).sum()) - nans} infinite"
        )
    if dtype == "float32":
        return amap, 1.0
    largest = float(np.abs(amap).max(initial=0))
    if dtype == "uint8":
        if amap.min(initial=0) < 0:
            raise ValueError(f"uint8 can't hold the map: its least value is {amap.min():g}")
        scale = np.float32(largest / 255) or np.float32(1)
        return np.rint(amap / scale).clip(0, 255).astype(np.uint8), float(scale)
    # Not below float32's smallest normal number: its reciprocal is one, too.
    scale = np.float32(2.0 ** max(np.frexp(largest)[1] - 1, -126) if largest else 1)
    return (amap / scale).astype(np.float16), float(scale)
