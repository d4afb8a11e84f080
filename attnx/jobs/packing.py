"""How a map is stored: its numbers in a small dtype, and one scale a map that gives them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

DTYPES = ("float16", "float32", "uint8")


class Result(NamedTuple):
    """A row of a shard, with a map or an error."""

    key: str
    text: str | None
    map: np.ndarray | None
    width: int | None
    height: int | None
    crop: tuple[float, ...] | None
    error: str | None


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
    largest = float(np.abs(amap).max())
    if dtype == "uint8":
        if amap.min() < 0:
            raise ValueError(f"uint8 can't hold the map: its least value is {amap.min():g}")
        scale = np.float32(largest / 255) or np.float32(1)
        return np.rint(amap / scale).clip(0, 255).astype(np.uint8), float(scale)
    # Not below float32's smallest normal number: its reciprocal is one, too.
    scale = np.float32(2.0 ** max(np.frexp(largest)[1] - 1, -126) if largest else 1)
    return (amap / scale).astype(np.float16), float(scale)


def schema(dtype: str) -> pa.Schema:
    """The columns of a shard."""
    import pyarrow as pa

    values = {"float16": pa.float16(), "float32": pa.float32(), "uint8": pa.uint8()}[dtype]
    columns = {
        "key": pa.string(), "text": pa.string(), "map": pa.list_(values), "shape": pa.list_(pa.int32()),
        "scale": pa.float32(), "width": pa.int32(), "height": pa.int32(), "crop": pa.list_(pa.float32()),
        "error": pa.string(),
    }  # fmt: skip
    return pa.schema(columns.items())


def table(results: list[Result], dtype: str) -> pa.Table:
    """The rows of a shard; a map that can't be stored becomes its row's error."""
    import pyarrow as pa

    rows: list[tuple[Any, ...]] = []
    for result in results:
        flat, shape, scale, error = None, None, None, result.error
        if result.map is not None:
            try:
                stored, scale = pack(np.asarray(result.map, np.float32), dtype)
                flat, shape = stored.reshape(-1), stored.shape
            except ValueError as cause:
                error = str(cause)
        rows.append((result.key, result.text, flat, shape, scale, result.width, result.height, result.crop, error))
    fields = schema(dtype)
    columns = zip(*rows, strict=True)
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, fields, strict=True)]
    return pa.Table.from_arrays(arrays, schema=fields)


def concatenate(tables: list[pa.Table], dtype: str) -> pa.Table:
    """Rows of several tables, of shards or new ones, as one shard's."""
    import pyarrow as pa

    return pa.concat_tables([schema(dtype).empty_table(), *(each.cast(schema(dtype)) for each in tables)])
