"""Estimates the size and the time of a job from a few batches, for `--dry-run`."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from attnx.jobs.options import RunOptions
from attnx.jobs.plan import default_shard_size, open_job
from attnx.jobs.progress import duration
from attnx.jobs.runtime import Runtime
from attnx.jobs.sources import Entry, Listing

__all__ = ["estimate"]

_BATCHES = 4


class _First:
    """The first entries of a source, and the number of all entries."""

    def __init__(self, source: Listing, count: int) -> None:
        entries = source.entries()
        self._first = list(islice(entries, count))
        self.count = len(self._first) + sum(1 for _ in entries)

    def entries(self) -> Iterator[Entry]:
        """The first entries."""
        return iter(self._first)


def estimate(
    runtime: Runtime,
    options: RunOptions,
    shard_size: int | None,
    unit: str = "images",
    say: Callable[[str], None] = print,
) -> str:
    """A text with the number of rows and shards, their size, and the time of the job on this device.

    The size and the time are measured on the first images, with files in a temporary folder. The first batch does not
    count for the time.

    Args:
        unit: name of the rows.
        say: called with messages about skipped files.
    """
    size = shard_size or default_shard_size(runtime.row_bytes)
    source = runtime.recipe.open_source()
    first = _First(source, (1 + _BATCHES) * options.batch_size)
    for line in source.skipped.lines():
        say(line)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_job(Path(folder), first, {}, {}, None, options.batch_size) as job,
        runtime.worker(job, options) as worker,
    ):
        files = [worker.run_shard(0).result()]
        start = time.perf_counter()
        files += [worker.run_shard(shard).result() for shard in range(1, job.shards)]
        seconds = time.perf_counter() - start
        rows = sum(made.rows for made in files[1:])
        written = sum(path.stat().st_size for path in job.out.glob("part-*")) / job.rows
    text = f"{first.count} {unit} in {-(-first.count // size)} shards of {size}; about {_size(written * first.count)}"
    if rows:
        text += f" and {duration(seconds / rows * first.count)} at {rows / seconds:.1f} {unit}/s"
    return f"{text}, from the first {job.rows}. Nothing was written."


def _size(count: float) -> str:
    power = min(3, int(math.log10(max(count, 1))) // 3)
    return f"{count / 1000**power:.1f} {('bytes', 'KB', 'MB', 'GB')[power]}"
