"""Storage of maps: a small dtype with one scale per map, and the columns of a shard."""

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
    """A row of a shard with a map or an error. tokens, word_of, score and cut are for captions."""

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
        dtype: dtype of the stored values: "float16", "float32" or "uint8".
        captions: add the columns tokens, word_of, score and cut.
    """

    dtype: str = "float16"
    captions: bool = False

    def schema(self) -> pa.Schema:
        """The columns and their types."""
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
        """The rows as a table. A map that can't be stored becomes an error of its row."""
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
            # The error may have a file name with invalid Unicode.
            row["error"] = None if row["error"] is None else text_of(row["error"])
            for name, values in columns.items():
                values.append(row[name])
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    def concatenate(self, tables: list[pa.Table]) -> pa.Table:
        """The rows of several tables as one table with the schema of a shard."""
        import pyarrow as pa

        schema = self.schema()
        return pa.concat_tables([schema.empty_table(), *(each.cast(schema) for each in tables)])


def pack(amap: np.ndarray, dtype: str) -> tuple[np.ndarray, float]:
    """The stored values and the scale of a float32 map: map = stored * scale.

    - float16: the scale is a power of two such that the largest magnitude is in [1, 2). Without it, maps of long
      sequences would be subnormal. The error is at most 2^-11 of each value, or 2^-25 of the largest.
    - uint8: the scale is the largest value / 255. The error is at most 1/510 of the largest value.
    - float32: the scale is 1.

    Raises:
        ValueError: the map has a NaN or an infinity, or for uint8 a negative value.
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
            raise ValueError(f"uint8 can't store negative values: the smallest value of the map is {amap.min():g}")
        scale = np.float32(largest / 255) or np.float32(1)
        return np.rint(amap / scale).clip(0, 255).astype(np.uint8), float(scale)
    # At least float32's smallest normal number, so that the reciprocal is a normal number, too.
    scale = np.float32(2.0 ** max(np.frexp(largest)[1] - 1, -126) if largest else 1)
    return (amap / scale).astype(np.float16), float(scale)
