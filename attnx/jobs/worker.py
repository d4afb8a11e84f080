"""What makes shards: entries to pictures to maps to a file, with decoding, the model and writing under way together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from attnx.jobs.decoding import Decoders, Picture
from attnx.jobs.job import Job
from attnx.jobs.packing import Format, Result
from attnx.jobs.pixels import Pixels
from attnx.jobs.shards import read_part, write_part
from attnx.jobs.sources import Entry

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

__all__ = ["Extract", "Made", "Stages", "Worker"]

_BATCHES_AHEAD = 3
Extract: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


class Made(NamedTuple):
    """A shard that was written: its number, the rows that were done for it, and how many of them have an error."""

    shard: int
    rows: int
    errors: int


@dataclass
class Stages:
    """Where the time went, in seconds. Of the thread that runs the model: images (waiting for pictures), device
    (to it), model, file (waiting for the shard before the last to be written). Beside it: decoding, in all processes
    together, pack and write.
    """

    images: float = 0.0
    device: float = 0.0
    model: float = 0.0
    file: float = 0.0
    decoding: float = 0.0
    pack: float = 0.0
    write: float = 0.0

    def __add__(self, other: Stages) -> Stages:
        return Stages(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class Worker:
    """Makes shards of a job; a context manager.

    Args:
        extract: [B, 3, h, w] float32 on `device` -> [B, ...] float maps. Where it runs out of memory, the batch is
            halved from then on, and `say` is told.
        format: of the shards.
        store: "map", "rows", or "full", of which maps stand in a file of their own.
    """

    job: Job
    decoders: Decoders
    pixels: Pixels
    extract: Extract
    device: Any = None
    batch_size: int = 32
    format: Format = field(default_factory=Format)
    store: str = "map"
    say: Callable[[str], None] = print
    stages: Stages = field(default_factory=Stages)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch-size: expected at least 1, got {self.batch_size}")
        self._most = self.batch_size
        self._begun: dict[int, _Shard] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="attnx-write")
        self._last: Future[Made] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        # What was made is written, by an error too: a shard that waits here is complete.
        self._background.shutdown()

    def run_shard(self, shard: int, following: int | None = None) -> Future[Made]:
        """Makes a shard that is not there, or the failed rows of one that is; the others keep their bits.

        It is written, whole or not at all, while the next one is made; the future says so, or fails with OSError.

        Args:
            following: the shard of the next call, if it is known: its first pictures are decoded meanwhile.
        """
        begun = [self._begin(number) for number in (shard, following) if number is not None]
        self._begun = {each.shard: each for each in begun}
        packed: list[Future[pa.Table]] = []
        for size in _batches(len(begun[0].entries), self.batch_size):
            start = time.perf_counter()
            batch = [self._next() for _ in range(size)]
            self.stages.images += time.perf_counter() - start
            packed.append(self._background.submit(self._pack, batch, self._maps(batch)))
        del self._begun[shard]
        last, self._last = self._last, self._background.submit(self._write, shard, packed)
        if last is not None:
            start = time.perf_counter()
            last.exception()
            self.stages.file += time.perf_counter() - start
        return self._last

    def _begin(self, shard: int) -> _Shard:
        if shard in self._begun:
            return self._begun[shard]
        entries = self.job.entries(shard)
        if self.job.part(shard).is_file():
            entries = [entry for entry, failed in zip(entries, self._failed(shard), strict=True) if failed]
        return _Shard(shard, entries, deque(entries), deque())

    def _failed(self, shard: int) -> np.ndarray:
        import pyarrow.parquet as pq

        column = pq.read_table(self.job.part(shard), columns=["error"]).column("error")
        failed: np.ndarray = column.is_valid().to_numpy()
        return failed

    def _next(self) -> tuple[Entry, Picture]:
        """The next entry of the shard under way, whose pictures and the following one's are begun ahead."""
        begun = list(self._begun.values())
        ahead = _BATCHES_AHEAD * self.batch_size + self.decoders.workers - sum(len(each.running) for each in begun)
        for each in begun:
            while each.waiting and ahead > 0:
                entry = each.waiting.popleft()
                each.running.append((entry, self.decoders.submit(entry)))
                ahead -= 1
        entry, future = begun[0].running.popleft()
        picture = future.result()
        self.stages.decoding += picture.seconds
        return entry, picture

    def _maps(self, batch: list[tuple[Entry, Picture]]) -> list[_Fetched]:
        """The maps of those that have pixels, in as many parts as memory asks for."""
        import torch

        found: list[_Fetched] = []
        waiting = [picture.pixels for _, picture in batch if picture.pixels is not None]
        while waiting:
            part = waiting[: self._most]
            try:
                start = time.perf_counter()
                images = self.pixels.normalise(_to_device(np.stack(part), self.device))
                ready = time.perf_counter()
                maps = self.extract(images)
                if maps.shape[:1] != (len(part),) or not maps.is_floating_point():
                    raise ValueError(f"extract: expected a float tensor [{len(part)}, ...]; got {list(maps.shape)}")
                found.append(_fetch(maps))
                self.stages.device += ready - start
                self.stages.model += time.perf_counter() - ready
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._most = len(part) // 2
                self.say(f"out of memory with {len(part)} images at a time: going on with {self._most}")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            del waiting[: len(part)]
        return found

    def _pack(self, batch: list[tuple[Entry, Picture]], found: list[_Fetched]) -> pa.Table:
        maps = iter([amap for fetched in found for amap in fetched.wait()])
        start = time.perf_counter()
        results = [
            Result(
                entry.key, entry.text, None if picture.pixels is None else next(maps), picture.width, picture.height,
                picture.crop, picture.error,
            )
            for entry, picture in batch
        ]  # fmt: skip
        packed = self.format.table(results)
        self.stages.pack += time.perf_counter() - start
        return packed

    def _write(self, shard: int, packed: list[Future[pa.Table]]) -> Made:
        made = self.format.concatenate([batch.result() for batch in packed])
        start = time.perf_counter()
        target, done = self.job.part(shard), made
        if target.is_file():
            failed = self._failed(shard)
            order = np.arange(len(failed))
            order[failed] = len(failed) + np.arange(len(made))
            done = self.format.concatenate([read_part(target), made]).take(order)
        write_part(done, target, tensors=self.store == "full")
        self.stages.write += time.perf_counter() - start
        return Made(shard, len(made), len(made) - int(made.column("error").null_count))


class _Shard(NamedTuple):
    """A shard under way: entries not yet begun, and those whose pictures are, in order."""

    shard: int
    entries: list[Entry]
    waiting: deque[Entry]
    running: deque[tuple[Entry, Future[Picture]]]


class _Fetched(NamedTuple):
    """Maps on their way to the CPU."""

    maps: torch.Tensor
    event: torch.cuda.Event | None

    def wait(self) -> np.ndarray:
        """[B, ...] float32."""
        if self.event is not None:
            self.event.synchronize()
        found: np.ndarray = self.maps.numpy()
        return found


def _batches(count: int, size: int) -> Iterator[int]:
    for first in range(0, count, size):
        yield min(size, count - first)


def _to_device(pixels: np.ndarray, device: Any) -> torch.Tensor:
    import torch

    tensor = torch.from_numpy(pixels)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _fetch(maps: torch.Tensor) -> _Fetched:
    import torch

    if maps.device.type != "cuda":
        return _Fetched(maps.detach().to("cpu", torch.float32), None)
    # Not waited for here: the GPU goes on with the next batch.
    host = torch.empty(maps.shape, dtype=torch.float32, pin_memory=True)
    host.copy_(maps.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(maps.device))
    return _Fetched(host, event)
