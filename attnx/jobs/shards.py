"""Parquet shards of maps: a file under a final name is complete, whatever happened to the job that wrote it.

Columns: see `attnx.jobs.packing.Format`. The job's settings are JSON in the schema's metadata under `attnx`. Any
Parquet reader reads the files.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnx.files import replacing
from attnx.jobs.tensors import join, split, tensors_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["SETTINGS", "count_errors", "parts", "read_part", "write_part"]

SETTINGS = b"attnx"
_ROWS_PER_GROUP = 256
_GROUP_BYTES = 4 * 2**20


def parts(out: Path) -> list[Path]:
    """The complete shards in a folder, by number."""
    # By number: in order of names, part-100000 comes before part-99999.
    with os.scandir(out) as entries:
        numbers = {entry.name: re.fullmatch(r"part-(\d+)\.parquet", entry.name) for entry in entries if entry.is_file()}
    return [out / name for _, name in sorted((int(match[1]), name) for name, match in numbers.items() if match)]


def count_errors(metadata: pq.FileMetaData) -> int:
    """How many rows of a shard have an error: by its statistics, without reading a row."""
    column = metadata.schema.to_arrow_schema().get_field_index("error")
    # Columns of lists are one leaf each, as here: a leaf's number is its field's.
    groups = (metadata.row_group(group).column(column) for group in range(metadata.num_row_groups))
    return int(metadata.num_rows - sum(group.statistics.null_count for group in groups))


def write_part(table: pa.Table, target: Path, settings: dict[str, Any], tensors: bool = False) -> None:
    """Writes a shard, whole or not at all; with `tensors` its maps in a safetensors file beside it, first."""
    import pyarrow.parquet as pq

    if tensors:
        table, content = split(table)
        with replacing(tensors_of(target)) as path:
            path.write_bytes(content)
    # A row is read with its group, which should be no more than a few megabytes.
    rows = max(1, min(_ROWS_PER_GROUP, len(table) * _GROUP_BYTES // max(table.nbytes, 1)))
    with replacing(target) as path:
        # BYTE_STREAM_SPLIT would be smaller, but DuckDB fails on it for float16.
        pq.write_table(
            table.replace_schema_metadata({SETTINGS: json.dumps(settings)}), path, row_group_size=rows,
            compression="zstd", use_dictionary=["shape.list.element", "error"], use_byte_stream_split=False,
            write_statistics=["key", "error"],
        )  # fmt: skip


def read_part(path: Path) -> pa.Table:
    """A shard as it was given to `write_part`."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return join(table, tensors_of(path)) if "tensor" in table.column_names else table
