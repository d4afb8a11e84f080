"""Parquet shards of maps: a file under a final name is complete, whatever happened to the job that wrote it.

Columns: key string, map list<float16>, shape list<int32>, width int32, height int32, error string (null when
fine); of captions also text string, tokens list<string>, word_of list<int32> and score float32. The job's settings are
JSON in the schema metadata under `attnx`. Any Parquet reader reads the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from attnx.jobs.tensors import join, split, tensors_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "SETTINGS",
    "ShardWriter",
    "count_errors",
    "parts",
    "read_part",
    "sync_folder",
    "write_part",
]

SETTINGS = b"attnx"
_ROWS_PER_GROUP = 256
_GROUP_BYTES = 4 * 2**20
# A shard closes early at this size, so that full per-head maps (11 MB an image) don't pile up in memory.
_BYTES_PER_SHARD = 256 * 2**20
_FLOAT16_MAX = 65504.0


class ShardWriter:
    """Writes rows to `out/part-00000.parquet` and so on; a context manager.

    A shard is written under a hidden temporary name, synced, renamed and the folder synced. Leaving the
    `with`, by an exception too, writes the rows that are still in memory. After a kill, the rows since the
    last full shard are missing, and a hidden `.part-*.tmp` may stay behind, which no reader looks at. One job
    a folder.

    Args:
        out: a folder, made where it is missing.
        settings: what the job was run with: anything JSON can hold (tuples come back as lists).
        rows_per_shard: at least 1. A shard closes earlier when its maps reach 256 MiB.
        captions: rows are of images and captions: the shards have the columns text, tokens, word_of and score too.

    Attributes:
        rows, failed, shards: rows added, those of them with an error, files written so far.

    Raises:
        OSError: `out` can't be made or written to, before anything else happens.
        ValueError: `out` already has part files, `settings` is not JSON, `rows_per_shard` is below 1.
    """

    def __init__(self, out: Path, settings: dict[str, Any], rows_per_shard: int = 4096, captions: bool = False) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard: expected at least 1, got {rows_per_shard}")
        self.out = Path(out)
        self.rows = self.failed = self.shards = 0
        self._schema = _schema(settings, captions)
        self._rows_per_shard = rows_per_shard
        self._buffer: list[tuple[Any, ...]] = []
        self._bytes = 0
        self._closed = False
        self._target: Path | None = None
        _prepare_folder(self.out)

    def add(
        self,
        key: str,
        map: np.ndarray | None,
        width: int | None = None,
        height: int | None = None,
        error: str | None = None,
        *,
        text: str | None = None,
        tokens: Sequence[str] | None = None,
        word_of: Sequence[int | None] | None = None,
        score: float | None = None,
    ) -> None:
        """Adds one row; writes a shard when it is full.

        Args:
            key: the image's name, valid Unicode.
            map: any shape but an empty one, float; stored as float16. With a NaN, an inf or a magnitude above
                65504, the row has that as its error and no map.
            width, height: of the picture, in pixels.
            error: why there is no map; exactly one of `map` and `error` is given.
            text, tokens, word_of, score: see `Row`; written by a writer of captions only.

        Raises:
            ValueError: a wrong argument, or the writer is closed. The row is not added, the others are not
                harmed.
            OSError: a shard can't be written. Its rows stay in memory, and `close` tries again.
        """
        if self._closed:
            raise ValueError(f"key: expected no row after close(), got {key!r}")
        if (map is None) == (error is None):
            got = "neither" if map is None else "both"
            raise ValueError(f"map, error: expected exactly one of them for {key!r}, got {got}")
        try:
            key.encode()
        except UnicodeEncodeError as cause:
            raise ValueError(f"key: expected valid Unicode, got {key!r}") from cause
        if map is not None:
            map, error = _to_float16(key, map)
        # A message may quote a file name that is not valid Unicode; JSON can hold a caption that is none.
        error, text = (None if x is None else x.encode(errors="backslashreplace").decode() for x in (error, text))
        flat, shape = (None, None) if map is None else (map.reshape(-1), map.shape)
        row = (key, flat, shape, width, height, error, text, tokens, word_of, score)
        self._buffer.append(row[: len(self._schema)])
        self._bytes += 0 if map is None else map.nbytes
        self.rows += 1
        self.failed += error is not None
        if len(self._buffer) >= self._rows_per_shard or self._bytes >= _BYTES_PER_SHARD:
            self._write_shard()

    def close(self) -> None:
        """Writes the rows that are still in memory. A second call does nothing if the first one succeeded."""
        if self._buffer:
            self._write_shard()
        self._closed = True

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            # What stopped the job stays the error that is seen.
            error.add_note(f"{self.out}: the last {len(self._buffer)} rows could not be written: {second}")

    def _write_shard(self) -> None:
        import pyarrow as pa

        target = self.out / f"part-{self.shards:05d}.parquet"
        # Its own name is no surprise when an interrupt came between the rename and the end of this function:
        # then the same rows are written again, over themselves.
        if target != self._target and target.exists():
            raise FileExistsError(f"out: expected no other job in {self.out}, got {target.name} from one")
        self._target = target
        columns = zip(*self._buffer, strict=True)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        write_atomically(pa.Table.from_arrays(arrays, schema=self._schema), target)
        self.shards, self._buffer, self._bytes = self.shards + 1, [], 0


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


def _schema(settings: dict[str, Any], captions: bool) -> pa.Schema:
    import pyarrow as pa

    try:
        text = json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: expected what JSON can hold, got {settings!r}: {error}") from error
    columns = {
        "key": pa.string(), "map": pa.list_(pa.float16()), "shape": pa.list_(pa.int32()),
        "width": pa.int32(), "height": pa.int32(), "error": pa.string(),
    }  # fmt: skip
    if captions:
        strings, numbers = pa.list_(pa.string()), pa.list_(pa.int32())
        columns |= {"text": pa.string(), "tokens": strings, "word_of": numbers, "score": pa.float32()}
    return pa.schema(columns.items(), metadata={SETTINGS: text})


def _prepare_folder(out: Path) -> None:
    probe = out / f".probe-{uuid.uuid4().hex}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        sync_folder(out)
    except OSError as error:
        message = f"out: expected a folder that can be written to ({error.strerror})"
        raise OSError(error.errno, message, str(out)) from error
    if parts(out):
        raise ValueError(f"out: expected a folder without part files, got {out}; choose another folder")


def _to_float16(key: str, map: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    if map.size == 0 or not np.issubdtype(map.dtype, np.floating):
        raise ValueError(f"map: expected floats, at least one, for {key!r}, got {map.dtype} {map.shape}")
    # A NaN compares false.
    fits = np.abs(map) <= _FLOAT16_MAX
    if fits.all():
        return map.astype(np.float16), None
    nans = int(np.isnan(map).sum())
    large = int((~fits).sum()) - nans
    return None, f"float16 can't hold the map: of {map.size} values, {nans} are NaN, {large} are beyond 65504"


def write_part(table: pa.Table, target: Path, tensors: bool = False) -> None:
    """Writes a shard, whole or not at all; with `tensors` its maps in a safetensors file beside it, first."""
    if tensors:
        table, content = split(table)
        _write_atomically(tensors_of(target), lambda file: file.write(content))
    write_atomically(table, target)


def read_part(path: Path) -> pa.Table:
    """A shard as it was given to `write_part`."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return join(table, tensors_of(path)) if "tensor" in table.column_names else table


def write_atomically(table: pa.Table, target: Path) -> None:
    """Writes a Parquet shard: its final name has all of it or is not there."""
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
    # Windows can't open a folder, and needs no sync of one.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
