"""Parquet shards of maps: a file under a final name is complete, whatever happened to the job that wrote it.

Columns: see `attnx.jobs.packing.Format`. The job's settings are JSON in the schema's metadata under `attnx`. Any
Parquet reader reads the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attnx.jobs.tensors import join, split, tensors_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SETTINGS", "count_errors", "parts", "read_part", "sync_folder", "write_part"]

SETTINGS = b"attnx"
_ROWS_PER_GROUP = 256
_GROUP_BYTES = 4 * 2**20


def parts(out: Path) -> list[Path]:
    """The complete shards in a folder, by number."""
    # By number: in order of names, part-100000 comes before part-99999.
    with os.scandir(out) as entries:
        numbers = {entry.name: re.fullmatch(r"part-(\d+)\.parquet", entry.name) for entry in entries if entry.is_file()}
    return [out / name for _, name in sorted((int(match[1]), name) for name, match in numbers.items() if match)]


def count_errors(path: Path) -> int:
    """How many rows of a shard have an error: by its statistics, without reading a row."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    column = metadata.schema.to_arrow_schema().get_field_index("error")
    # Columns of lists are one leaf each, as here: a leaf's number is its field's.
    nulls = sum(
        metadata.row_group(group).column(column).statistics.null_count for group in range(metadata.num_row_groups)
    )
    return int(metadata.num_rows - nulls)


def write_part(table: pa.Table, target: Path, settings: dict[str, Any], tensors: bool = False) -> None:
    """Writes a shard, whole or not at all; with `tensors` its maps in a safetensors file beside it, first."""
    if tensors:
        table, content = split(table)
        _write_atomically(tensors_of(target), lambda file: file.write(content))
    _write_table(table.replace_schema_metadata({SETTINGS: json.dumps(settings)}), target)


def read_part(path: Path) -> pa.Table:
    """A shard as it was given to `write_part`."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return join(table, tensors_of(path)) if "tensor" in table.column_names else table


def _write_table(table: pa.Table, target: Path) -> None:
    import pyarrow.parquet as pq

    # A row is read with its group, which should be no more than a few megabytes.
    rows = max(1, min(_ROWS_PER_GROUP, len(table) * _GROUP_BYTES // max(table.nbytes, 1)))

    def write(file: IO[bytes]) -> None:
        # BYTE_STREAM_SPLIT would be smaller, but DuckDB fails on it for float16.
        pq.write_table(
            table, file, row_group_size=rows, compression="zstd", use_dictionary=["shape.list.element", "error"],
            use_byte_stream_split=False, write_statistics=["key", "error"],
        )  # fmt: skip

    _write_atomically(target, write)


def _write_atomically(target: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """By way of a temporary, fsync, rename, and fsync of the folder."""
    temporary = target.with_name(f".{target.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
