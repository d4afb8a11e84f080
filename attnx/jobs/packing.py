"""Storage of maps: a small dtype with one scale per map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx.jobs.columns import MapRow, schema
from attnx.jobs.sources import text_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DTYPES", "STORES", "Format", "pack"]

DTYPES = ("float16", "float32", "uint8")
STORES = ("map", "rows", "full")


@dataclass(frozen=True)
class Format:
    """The format of a job's shards.

    Args:
        dtype: dtype of the stored values: "float16", "float32" or "uint8".
        captions: add the columns of captions, see `attnx.jobs.columns`.
        stats: names of the columns of statistics, in place of maps.
    """

    dtype: str = "float16"
    captions: bool = False
    stats: tuple[str, ...] = ()

    def schema(self) -> pa.Schema:
        """The columns and their types."""
        return schema(self.dtype, self.captions, self.stats)

    def table(self, rows: list[MapRow]) -> pa.Table:
        """The rows as a table. A map or statistics that can't be stored become an error of their row."""
        import pyarrow as pa

        schema = self.schema()
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        for row in rows:
            values: dict[str, Any] = {**vars(row), "shape": None, "scale": None}
            if row.map is not None:
                try:
                    stored, values["scale"] = pack(np.asarray(row.map, np.float32), self.dtype)
                    values["map"], values["shape"] = stored.reshape(-1), stored.shape
                except ValueError as cause:
                    values["map"], values["error"] = None, str(cause)
            if self.stats and values["error"] is None:
                values["error"] = next(filter(None, (_unstorable(name, values[name]) for name in self.stats)), None)
            if self.stats and values["error"] is not None:
                values |= dict.fromkeys(self.stats)
            # The error may have a file name with invalid Unicode.
            values["error"] = None if values["error"] is None else text_of(values["error"])
            for name, column in columns.items():
                column.append(values[name])
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    def concatenate(self, tables: list[pa.Table]) -> pa.Table:
        """The rows of several tables as one table with the schema of a shard. Columns that a table lacks are null."""
        import pyarrow as pa

        schema = self.schema()
        whole = pa.concat_tables([schema.empty_table(), *tables], promote_options="default")
        return whole.select(schema.names).cast(schema)


def _unstorable(name: str, values: np.ndarray | None) -> str | None:
    """The reason that a statistic can't be stored: a head's is not finite; None if it can."""
    if values is None or np.isfinite(values).all():
        return None
    return f"the {name} is not finite in {int((~np.isfinite(values)).sum())} of {values.size} heads"


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
