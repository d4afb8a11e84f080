"""Maps too large for a table: a safetensors file beside a shard, whose rows say which of its tensors is theirs.

`part-00007.safetensors` is written before `part-00007.parquet`, which has the column `tensor` in place of `map`; so a
shard is there when its Parquet file is, as any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["join", "read_tensor", "split", "tensors_of"]


def tensors_of(shard: Path) -> Path:
    """The file beside a shard."""
    return shard.with_suffix(".safetensors")


def split(table: pa.Table) -> tuple[pa.Table, bytes]:
    """Rows with maps -> rows with the column tensor, and the content of the file."""
    import pyarrow as pa
    from safetensors.numpy import save

    maps, shapes = table.column("map"), table.column("shape").to_pylist()
    names = [None if shape is None else str(i) for i, shape in enumerate(shapes)]
    tensors = {
        name: maps[i].values.to_numpy(zero_copy_only=False).reshape(shapes[i])
        for i, name in enumerate(names)
        if name is not None
    }
    place = table.column_names.index("map")
    return table.set_column(place, "tensor", pa.array(names, pa.string())), save(tensors)


def join(table: pa.Table, path: Path) -> pa.Table:
    """The rows with maps again."""
    import pyarrow as pa
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        maps = [
            None if name is None else file.get_tensor(name).reshape(-1) for name in table.column("tensor").to_pylist()
        ]
    return table.set_column(table.column_names.index("tensor"), "map", pa.array(maps))


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One of them, as it is stored."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        found: np.ndarray = file.get_tensor(name)
        return found
