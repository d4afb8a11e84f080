"""The work of a job, shard by shard: entries to pictures to pixels to maps to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx.images import ImageError, read_image
from attnx.jobs.job import Job
from attnx.jobs.packing import Result, table
from attnx.jobs.pixels import Crop, Pixels
from attnx.jobs.reading import Progress, read_in_order, reader_pool
from attnx.jobs.shards import write_atomically
from attnx.jobs.sources import Entry, Reader

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    Extract = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["Done", "Maker", "run_job"]

_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class _Read:
    """An entry's pixels, or why there are none."""

    entry: Entry
    pixels: np.ndarray | None = None
    width: int | None = None
    height: int | None = None
    crop: Crop | None = None
    error: str | None = None


@dataclass(frozen=True)
class Done:
    """What a run did: rows of new shards, shards written, seconds; and the rows that were done before it."""

    rows: int
    shards: int
    seconds: float
    before: int


@dataclass
class Maker:
    """Makes the rows of a shard out of its entries.

    Args:
        read, pixels: entries to what the model takes.
        extract: [B, 3, h, w] float32 on `device` -> [B, ...] float maps. Where it runs out of memory, the batch is
            halved from then on, and `say` is told.
        map_dtype: "float16", "float32", "uint8".
        max_pixels: a larger picture is its row's error.
    """

    read: Reader
    pixels: Pixels
    extract: Extract
    pool: ThreadPoolExecutor
    device: Any = None
    batch_size: int = 32
    map_dtype: str = "float16"
    max_pixels: int | None = None
    say: Callable[[str], None] = print
    _most: int = field(init=False)

    def __post_init__(self) -> None:
        self._most = self.batch_size

    def table(self, entries: list[Entry]) -> pa.Table:
        """A row an entry, in order."""
        return table([result for batch in self._batches(entries) for result in self._results(batch)], self.map_dtype)

    def _batches(self, entries: list[Entry]) -> Iterator[list[_Read]]:
        ready = read_in_order(self.pool, self._load, entries, _BATCHES_AHEAD * self.batch_size)
        while batch := list(islice(ready, self.batch_size)):
            yield batch

    def _load(self, entry: Entry) -> _Read:
        if entry.error is not None:
            return _Read(entry, error=entry.error)
        try:
            picture = read_image(*self.read(entry), max_pixels=self.max_pixels)
        except ImageError as error:
            return _Read(entry, error=str(error))
        # A reader of a tar or a data set fails as files do; a broken Arrow file in its own ways.
        except Exception as error:
            return _Read(entry, error=f"{entry.path}: {type(error).__name__}: {error}")
        pixels, crop = self.pixels(picture)
        return _Read(entry, pixels, picture.width, picture.height, crop)

    def _results(self, batch: list[_Read]) -> Iterator[Result]:
        good = [item.pixels for item in batch if item.pixels is not None]
        maps = iter(self._maps(np.stack(good))) if good else iter(())
        for item in batch:
            amap = None if item.pixels is None else next(maps)
            yield Result(item.entry.key, item.entry.text, amap, item.width, item.height, item.crop, item.error)

    def _maps(self, pixels: np.ndarray) -> np.ndarray:
        """[B, 3, h, w] -> [B, ...] float32, in as many parts as memory asks for."""
        import torch

        maps: list[np.ndarray] = []
        while len(pixels):
            part = pixels[: self._most]
            try:
                images = self.pixels.normalise(torch.from_numpy(part).to(self.device))
                found = self.extract(images)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._most = len(part) // 2
                self.say(f"out of memory with {len(part)} images at a time: going on with {self._most}")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            if found.shape[:1] != (len(part),) or not found.is_floating_point():
                raise ValueError(f"extract: expected a float tensor [{len(part)}, ...]; got {list(found.shape)}")
            maps.append(found.detach().to("cpu", torch.float32).numpy())
            pixels = pixels[len(part) :]
        return np.concatenate(maps)


def run_job(
    job: Job,
    read: Reader,
    pixels: Pixels,
    extract: Extract,
    *,
    workers: int | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Done:
    """Does what is left of a job: the shards that are not there, or with `retry_failed` also rows with an error.

    An interrupt or a kill loses the shard that was under way. Other arguments: see `Maker`.

    Args:
        workers: threads that decode; by default the number of usable cores, at most 16.
        progress: called as progress(done, total) rows after every shard; done counts those of earlier runs.

    Raises:
        OSError: a shard can't be written; those before it are.
    """
    start, todo = time.perf_counter(), job.todo()
    again = job.failed() if retry_failed else []
    before = job.rows - sum(map(job.rows_of, todo))
    rows = 0
    with reader_pool(workers) as pool:
        maker = Maker(read, pixels, extract, pool, **options)
        if progress is not None:
            progress(before, job.rows)
        for shard in again:
            _retry_shard(job, maker, shard)
        for shard in todo:
            rows += len(_run_shard(job, maker, shard))
            if progress is not None:
                progress(before + rows, job.rows)
    return Done(rows, len(todo) + len(again), time.perf_counter() - start, before)


def _run_shard(job: Job, maker: Maker, shard: int) -> pa.Table:
    """Writes a shard, whole or not at all: the only unit of work."""
    done = maker.table(job.entries(shard))
    write_atomically(done, job.part(shard))
    return done


def _retry_shard(job: Job, maker: Maker, shard: int) -> pa.Table:
    """Does the failed rows of a shard again, and leaves the others their bits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    old = pq.read_table(job.part(shard))
    failed = old.column("error").is_valid().to_numpy()
    entries = [entry for entry, again in zip(job.entries(shard), failed, strict=True) if again]
    order = np.arange(len(old))
    order[failed] = len(old) + np.arange(len(entries))
    done = pa.concat_tables([old, maker.table(entries)]).take(order)
    write_atomically(done, job.part(shard))
    return done
