"""The worker makes shards: it decodes images, runs the model and writes files. The three stages run in parallel."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnx.jobs.ahead import DecodeAhead, entry_to_read
from attnx.jobs.attempts import Attempt
from attnx.jobs.columns import MapRow
from attnx.jobs.decoding import Decoders
from attnx.jobs.engines.queue import RunError, is_fatal
from attnx.jobs.job import Job
from attnx.jobs.runner import Batch, Images, Runner, Stages, on_cpu
from attnx.jobs.shards import read_part, write_part
from attnx.jobs.sources import Entry
from attnx.jobs.sources.reachable import Reachable
from attnx.jobs.tasks import Task
from attnx.models.pixels import Pixels

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ShardResult", "Stages", "Worker"]

_MOST_OF_ONE = 4
_SAMPLED = 200  # rows to try if none is known to be readable


class ShardResult(NamedTuple):
    """A written shard: its number, the number of rows that were made, and how many of them have an error."""

    shard: int
    rows: int
    errors: int


@dataclass
class Worker:
    """Makes shards of a job; a context manager.

    Args:
        pixels: the preprocessing of `decoders`; the worker normalises.
        task: computes maps of images on `device`. When it runs out of memory, the batch is halved for the rest of the
            run, with a message through `say`.
        batch_size: entries per batch; up to four times as many if one image has more captions.
        tensors: maps are stored in a separate file, see `attnx.jobs.tensors`.
        fill: pad every batch with zero images, for models that are compiled for one shape.
        tries: failures before a shard is made in pieces, see `attnx.jobs.attempts`.
        shard_timeout: see `Watch`.
        hang: called as hang(why, shard) when the model hangs. It must end the process. None: hangs are not detected.
        source: the source of the images. If images are unreachable, a shard is only written if the source is still
            reachable.
    """

    job: Job
    decoders: Decoders
    pixels: Pixels
    task: Task
    device: Any = None
    batch_size: int = 16
    tensors: bool = False
    fill: bool = False
    say: Callable[[str], None] = print
    stages: Stages = field(default_factory=Stages)
    tries: int = 3
    shard_timeout: float | None = None
    hang: Callable[[str, int], None] | None = None
    source: Reachable | None = None

    def __post_init__(self) -> None:
        self._ahead = DecodeAhead(self.decoders, self.batch_size, self._groups)
        self._runner = Runner(
            self.pixels, self.task, self.device, self.batch_size, self.fill, self.say, self.stages, self.shard_timeout,
            self.hang, any_map=bool(self.job.done()),
        )  # fmt: skip
        self._background = ThreadPoolExecutor(1, thread_name_prefix="attnx-write")
        self._last: Future[ShardResult] | None = None

    def __enter__(self) -> Worker:
        self._runner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        # A shard that is waiting to be written is complete, so it is written even after an error.
        self._background.shutdown()
        self._runner.__exit__(*error)

    def run_shard(self, shard: int, following: int | None = None) -> Future[ShardResult]:
        """Make a missing shard, or the failed rows of an existing one. Other rows keep their exact bytes.

        The shard is written atomically while the next one is made. The future has the result, or an OSError.

        Args:
            following: the shard of the next call, if known. Decoding of its first pictures starts early.
        """
        all_groups = self._ahead.begin(shard, following, alternate=on_cpu(self.device))
        packed: list[Future[pa.Table]] = []
        attempt = self.job.attempt(shard)
        in_pieces = attempt.begun >= self.tries or bool(attempt.failed)
        if in_pieces and self._last is not None:
            # The GPU may still work on the previous shard, and fail there.
            self._last.exception()
        attempt.begin()
        done, unreachable = 0, list[Entry]()
        try:
            for groups in _batches(all_groups, self.batch_size):
                start = time.perf_counter()
                batch = [(group, self._ahead.next()) for group in groups]
                self.stages.images += time.perf_counter() - start
                self.stages.decoding += sum(picture.seconds for _, picture in batch)
                unreachable += self._note_source(batch)
                images = Images(attempt, done, done + len(batch))
                start_batch = self._runner.start_pieces if in_pieces else self._runner.start
                packed.append(self._background.submit(self._pack, batch, start_batch(batch, images), images))
                done = images.stop
            if in_pieces:
                self._runner.check(2, attempt)
            if unreachable:
                self._check_source(unreachable)
        except BaseException as error:
            if not isinstance(error, Exception) or is_fatal(error):
                attempt.withdraw()
            raise
        finally:
            # After a failure, the shard can be started again.
            self._ahead.drop(shard)
        last, self._last = self._last, self._background.submit(self._write, shard, packed, attempt)
        if last is not None:
            start = time.perf_counter()
            last.exception()
            self.stages.file += time.perf_counter() - start
        return self._last

    def _note_source(self, batch: Batch) -> list[Entry]:
        """The entries that may have failed because of the source. Entries that could be read are recorded."""
        read = [(entry_to_read(group), picture) for group, picture in batch]
        for entry, picture in read:
            if picture.pixels is not None and self.source is not None:
                self.source.add(entry)
        return [entry for entry, picture in read if picture.unreachable]

    def _check_source(self, failed: list[Entry]) -> None:
        """Raise RunError if the source of the unreachable entries is gone."""
        if self.source is None:
            return
        rows = np.linspace(0, self.job.rows - 1, num=min(_SAMPLED, self.job.rows), dtype=np.int64).tolist()
        why = self.source.why_not(failed, (self.job.entry(row) for row in rows))
        if why is not None:
            message = f"source: {self.source.path} can't be reached: {why}. Nothing of this shard was written"
            raise RunError(f"{message}; run the same command again when it is reachable")

    def _groups(self, shard: int) -> list[list[Entry]]:
        """The entries of each image of a missing shard, or those of an existing shard's failed rows."""
        entries = self.job.entries(shard)
        if self.job.part(shard).is_file():
            entries = [entry for entry, failed in zip(entries, self._failed(shard), strict=True) if failed]
        most = _MOST_OF_ONE * self.batch_size
        return [part for group in self.task.groups(entries) for part in _parts(group, most)]

    def _failed(self, shard: int) -> np.ndarray:
        column = self.job.open_part(shard).table(["error"]).column("error")
        failed: np.ndarray = column.is_valid().to_numpy()
        return failed

    def _pack(self, batch: Batch, waits: list[Callable[[], list[MapRow]]], images: Images) -> pa.Table:
        with self._runner.model(images):
            made = itertools.chain.from_iterable([wait() for wait in waits])
        start = time.perf_counter()
        rows = []
        for group, picture in batch:
            for entry in group:
                error = entry.error or picture.error
                row = next(made) if picture.pixels is not None else MapRow(entry.key)
                rows.append(
                    replace(
                        row, text=entry.text, map=None if error else row.map, width=picture.width,
                        height=picture.height, crop=picture.crop, error=error or row.error,
                    )
                )  # fmt: skip
        packed = self.task.format.table(rows)
        self.stages.pack += time.perf_counter() - start
        return packed

    def _write(self, shard: int, packed: list[Future[pa.Table]], attempt: Attempt) -> ShardResult:
        try:
            made = self._write_part(shard, packed)
        except Exception as error:
            if is_fatal(error):
                attempt.withdraw()
            raise
        attempt.end()
        return made

    def _check_plan(self) -> None:
        """Raise RunError if another run has replaced the job; a retry would not help."""
        try:
            self.job.check_plan()
        except ValueError as error:
            raise RunError(str(error)) from error

    def _write_part(self, shard: int, packed: list[Future[pa.Table]]) -> ShardResult:
        # Checked before anything is read: the folder may belong to another run now.
        self._check_plan()
        made = self.task.format.concatenate([batch.result() for batch in packed])
        start = time.perf_counter()
        target, done = self.job.part(shard), made
        if target.is_file():
            failed = self._failed(shard)
            order = np.arange(len(failed))
            order[failed] = len(failed) + np.arange(len(made))
            done = self.task.format.concatenate([read_part(target), made]).take(order)
        try:
            write_part(done, target, self.job.run["settings"], self.tensors, self.job.place(shard))
        except FileNotFoundError:
            # Another run that starts removes temporary files.
            self._check_plan()
            raise
        self.stages.write += time.perf_counter() - start
        return ShardResult(shard, len(made), len(made) - int(made.column("error").null_count))


def _parts(group: list[Entry], most: int) -> Iterator[list[Entry]]:
    for first in range(0, len(group), most):
        yield group[first : first + most]


def _batches(groups: list[list[Entry]], size: int) -> Iterator[list[list[Entry]]]:
    """Batches of whole groups with at most `size` entries, but at least one group."""
    batch: list[list[Entry]] = []
    for group in groups:
        if batch and sum(map(len, batch)) + len(group) > size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch
