"""What makes shards: entries to pictures to maps to a file, with decoding, the model and writing under way together."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from attnx.jobs.attempts import Attempt
from attnx.jobs.decoding import Decoders, Picture
from attnx.jobs.engines.queue import RunError, blame_the_model, is_fatal, why_of
from attnx.jobs.job import Job
from attnx.jobs.packing import Result
from attnx.jobs.pixels import Pixels
from attnx.jobs.shards import read_part, write_part
from attnx.jobs.sources import Entry
from attnx.jobs.sources.reachable import Reachable
from attnx.jobs.tasks import Found, Task
from attnx.jobs.watch import Hang, Watch

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Made", "Stages", "Worker"]

_BATCHES_AHEAD = 3
_MOST_OF_ONE = 4
_COMPUTES = 0.75  # of a decoder's time: below that, it mostly waits
_PATIENCE = 5.0  # seconds, with a picture that holds up the others
_Batch: TypeAlias = "list[tuple[list[Entry], Picture]]"
_Readable: TypeAlias = "tuple[list[Entry], np.ndarray]"
_SAMPLED = 20  # rows of a source of which none is known to be readable
_ALONE = 8  # images that fail one by one, and none that doesn't, until the model is blamed


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
        pixels: how `decoders` prepare images, which are normalised here.
        task: maps of images on `device`. Where it runs out of memory, the batch is halved from then on, and `say` is
            told.
        batch_size: entries at a time; up to four times as many where one image has more captions.
        tensors: maps stand in a file of their own, see `attnx.jobs.tensors`.
        fill: every batch is filled up with images of zeros: what runs the model is made for one shape.
        tries: a shard that failed so often is made in pieces, see `attnx.jobs.attempts`.
        shard_timeout: see `Watch`.
        hang: ends the process, and says why: it is called when the model hangs. None: nothing is done.
        source: of the images; where some can't be reached, no shard is written unless it is still there.
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
    hang: Callable[[str], None] | None = None
    source: Reachable | None = None

    def __post_init__(self) -> None:
        self._most = self.batch_size
        self._begun: dict[int, _Shard] = {}
        self._turns = False
        self._alone, self._any_map = 0, False
        # A GPU's kernels may be compiled for the shape of a batch.
        least = 10.0 if self._on_cpu() else 60.0
        self._watch = Watch(self.shard_timeout, None if self.hang is None else self._hangs, least)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="attnx-write")
        self._last: Future[Made] | None = None

    def __enter__(self) -> Worker:
        self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        # What was made is written, by an error too: a shard that waits here is complete.
        self._background.shutdown()
        self._watch.__exit__()

    def run_shard(self, shard: int, following: int | None = None) -> Future[Made]:
        """Makes a shard that is not there, or the failed rows of one that is; the others keep their bits.

        It is written, whole or not at all, while the next one is made; the future says so, or fails with OSError.

        Args:
            following: the shard of the next call, if it is known: its first pictures are decoded meanwhile.
        """
        begun = [self._begin(number) for number in (shard, following) if number is not None]
        self._begun = {each.shard: each for each in begun}
        packed: list[Future[pa.Table]] = []
        self._turns = self._on_cpu()
        attempt = Attempt.of(self.job.out, shard)
        in_pieces = attempt.begun >= self.tries or bool(attempt.failed)
        attempt.begin()
        done, unreachable = 0, False
        try:
            for groups in _batches(begun[0].groups, self.batch_size):
                start = time.perf_counter()
                batch = [(group, self._next()) for group in groups]
                self.stages.images += time.perf_counter() - start
                unreachable |= self._note_source(batch)
                images = _Images(attempt, done, done + len(batch))
                make = self._start_pieces if in_pieces else self._start
                packed.append(self._background.submit(self._pack, batch, make(batch, images), images))
                done = images.stop
            if unreachable:
                self._check_source()
        except BaseException as error:
            if not isinstance(error, Exception) or is_fatal(error):
                attempt.withdraw()
            raise
        finally:
            # Where it failed, it can be begun again.
            del self._begun[shard]
        last, self._last = self._last, self._background.submit(self._write, shard, packed, attempt)
        if last is not None:
            start = time.perf_counter()
            last.exception()
            self.stages.file += time.perf_counter() - start
        return self._last

    def _on_cpu(self) -> bool:
        return self.device is None or torch.device(self.device).type == "cpu"

    def _note_source(self, batch: _Batch) -> bool:
        """Remembers an image that could be read; True if the source may be why another could not."""
        if self.source is not None:
            for group, picture in batch:
                if picture.pixels is not None:
                    self.source.add(next((entry for entry in group if entry.error is None), group[0]))
        return any(picture.unreachable for _, picture in batch)

    def _check_source(self) -> None:
        """Raises RunError if the source is gone."""
        if self.source is None:
            return
        rows = np.linspace(0, self.job.rows - 1, num=min(_SAMPLED, self.job.rows), dtype=np.int64).tolist()
        why = self.source.why_not(self.job.entry(row) for row in rows)
        if why is not None:
            told = f"source: {self.source.path} can't be reached: {why}. Nothing of this shard was written"
            raise RunError(f"{told}; run the same command again when it is there")

    def _begin(self, shard: int) -> _Shard:
        if shard in self._begun:
            return self._begun[shard]
        entries = self.job.entries(shard)
        if self.job.part(shard).is_file():
            entries = [entry for entry, failed in zip(entries, self._failed(shard), strict=True) if failed]
        most = _MOST_OF_ONE * self.batch_size
        groups = [part for group in self.task.groups(entries) for part in _parts(group, most)]
        # An image is read by an entry that has no error of its own, if there is one.
        first = (next((entry for entry in group if entry.error is None), group[0]) for group in groups)
        return _Shard(shard, groups, deque(first), deque())

    def _failed(self, shard: int) -> np.ndarray:
        column = self.job.open_part(shard).table(["error"]).column("error")
        failed: np.ndarray = column.is_valid().to_numpy()
        return failed

    def _next(self) -> Picture:
        """The next picture of the shard under way; later ones, and the following shard's, are begun ahead.

        On a CPU, decoders and model take turns of a few batches: threads of a model that meet after every operation
        wait for one that shares its core. Not where decoding mostly waits: each shard's first turn tells.
        """
        begun = list(self._begun.values())
        if not (self._turns and begun[0].running):
            ahead = _BATCHES_AHEAD * self.batch_size + self.decoders.workers - sum(len(each.running) for each in begun)
            for each in begun:
                while each.waiting and ahead > 0:
                    each.running.append(self.decoders.submit(each.waiting.popleft()))
                    ahead -= 1
            if self._turns:
                self._turns = _computes([future for each in begun for future in each.running])
        picture = begun[0].running.popleft().result()
        self.stages.decoding += picture.seconds
        return picture

    def _start(self, batch: _Batch, images: _Images) -> list[Callable[[], list[Found]]]:
        """Begins with those that have pixels, in as many parts as memory asks for."""
        waits: list[Callable[[], list[Found]]] = []
        waiting = [(group, picture.pixels) for group, picture in batch if picture.pixels is not None]
        while waiting:
            part, full = waiting[: self._most], False
            try:
                start = time.perf_counter()
                pixels = _to_device(np.stack([pixels for _, pixels in part]), self.device)
                normalised = self._filled(self.pixels.normalise(pixels))
                ready = time.perf_counter()
                with self._model(images):
                    waits.append(self.task.start(normalised, [group for group, _ in part]))
                self.stages.device += ready - start
                self.stages.model += time.perf_counter() - ready
                del waiting[: len(part)]
            except torch.OutOfMemoryError:
                waiting[: len(part)] = self._halved(part)
                full = True
            # Not where the error still holds what was computed.
            if full and torch.cuda.is_available():
                torch.cuda.empty_cache()
        return waits

    def _start_pieces(self, batch: _Batch, images: _Images) -> list[Callable[[], list[Found]]]:
        """What `_start` does, and waits. A piece of the batch that fails is halved; an image that fails alone gets that
        as its error.

        Raises:
            RunError: the model fails at every image.
        """
        found: list[Found] = []
        waiting = [(0, len(batch))]
        attempt = images.attempt
        while waiting:
            first, last = waiting.pop()
            piece = _Images(attempt, images.start + first, images.start + last)
            why = attempt.why_not(piece.start, piece.stop)
            if why is None:
                try:
                    attempt.begin_piece(piece.start, piece.stop)
                    made = self._run_piece(batch, first, last, piece)
                    attempt.end_piece()
                    found += made
                    self._any_map |= bool(made)
                    continue
                except Exception as error:
                    if is_fatal(error):
                        raise
                    why = f"the model fails at this image: {why_of(error)}"[:300]
                    attempt.fail(piece.start, piece.stop, why)
            if last - first > 1:
                middle = (first + last) // 2
                waiting += [(middle, last), (first, middle)]
                continue
            self._alone += 1
            if self._alone >= _ALONE and not self._any_map:
                raise RunError(f"the model fails at every image; at the last: {why}")
            group, picture = batch[first]
            found += [Found(error=why)] * len(group) if picture.pixels is not None else []
        return [lambda: found]

    def _run_piece(self, batch: _Batch, first: int, last: int, images: _Images) -> list[Found]:
        """What is found for a piece of a batch.

        Its images stay where they are in the batch, whose others are replaced by them, so that no sum is rounded in
        another way. Captions are taken alone.
        """
        piece = batch[first:last]
        own = [picture for _, picture in piece if picture.pixels is not None]
        if not own:
            return []
        if not self.task.format.captions:
            others = itertools.cycle(own)
            piece = [
                (group, picture if first <= i < last or picture.pixels is None else next(others))
                for i, (group, picture) in enumerate(batch)
            ]
        waits = self._start(piece, images)
        with self._model(images):
            found = [one for wait in waits for one in wait()]
        if self.task.format.captions:
            return found
        readable = [i for i, (group, picture) in enumerate(batch) for _ in group if picture.pixels is not None]
        return [one for i, one in zip(readable, found, strict=True) if first <= i < last]

    @contextlib.contextmanager
    def _model(self, images: _Images) -> Iterator[None]:
        """The model runs inside: it is watched, and blamed for what is raised."""
        try:
            with self._watch.section(*images):
                yield
        except Exception as error:
            blame_the_model(error)
            raise

    def _hangs(self, where: Hang) -> None:
        why = f"the model took longer than {where.limit:g} s"
        where.attempt.fail(where.start, where.stop, why, where.limit)
        assert self.hang is not None
        self.hang(why)

    def _filled(self, images: torch.Tensor) -> torch.Tensor:
        if not self.fill or len(images) == self._most:
            return images
        return torch.nn.functional.pad(images, (0, 0) * (images.dim() - 1) + (0, self._most - len(images)))

    def _halved(self, part: list[_Readable]) -> list[_Readable]:
        """What did not fit into memory, to be tried in smaller parts; re-raises where it can't be cut."""
        if len(part) > 1:
            self._most = len(part) // 2
            self.say(f"out of memory with {len(part)} images at a time: going on with {self._most}")
            return part
        (group, pixels) = part[0]
        if len(group) == 1:
            raise
        half = len(group) // 2
        self.say(f"out of memory with {len(group)} captions of an image: going on with {half}")
        return [(group[:half], pixels), (group[half:], pixels)]

    def _pack(self, batch: _Batch, waits: list[Callable[[], list[Found]]], images: _Images) -> pa.Table:
        with self._model(images):
            found = itertools.chain.from_iterable([wait() for wait in waits])
        start = time.perf_counter()
        results = []
        for group, picture in batch:
            for entry in group:
                error = entry.error or picture.error
                own = next(found) if picture.pixels is not None else Found()
                size = picture.width, picture.height, picture.crop
                results.append(
                    Result(
                        entry.key, entry.text, None if error else own.map, *size, error or own.error, own.tokens,
                        own.word_of, own.score, own.cut,
                    )
                )  # fmt: skip
        packed = self.task.format.table(results)
        self.stages.pack += time.perf_counter() - start
        return packed

    def _write(self, shard: int, packed: list[Future[pa.Table]], attempt: Attempt) -> Made:
        try:
            made = self._write_part(shard, packed)
        except Exception as error:
            if is_fatal(error):
                attempt.withdraw()
            raise
        attempt.end()
        return made

    def _write_part(self, shard: int, packed: list[Future[pa.Table]]) -> Made:
        made = self.task.format.concatenate([batch.result() for batch in packed])
        start = time.perf_counter()
        target, done = self.job.part(shard), made
        if target.is_file():
            failed = self._failed(shard)
            order = np.arange(len(failed))
            order[failed] = len(failed) + np.arange(len(made))
            done = self.task.format.concatenate([read_part(target), made]).take(order)
        self.job.check_plan()
        write_part(done, target, self.job.run["settings"], self.tensors, self.job.place(shard))
        self.stages.write += time.perf_counter() - start
        return Made(shard, len(made), len(made) - int(made.column("error").null_count))


class _Images(NamedTuple):
    """Images start <= i < stop of the shard of a note."""

    attempt: Attempt
    start: int
    stop: int


class _Shard(NamedTuple):
    """A shard under way: groups of entries of one image; of images not yet begun, an entry; and pictures, in order."""

    shard: int
    groups: list[list[Entry]]
    waiting: deque[Entry]
    running: deque[Future[Picture]]


def _parts(group: list[Entry], most: int) -> Iterator[list[Entry]]:
    for first in range(0, len(group), most):
        yield group[first : first + most]


def _batches(groups: list[list[Entry]], size: int) -> Iterator[list[list[Entry]]]:
    """Whole groups, as many as stay within `size` entries, at least one."""
    batch: list[list[Entry]] = []
    for group in groups:
        if batch and sum(map(len, batch)) + len(group) > size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _computes(pictures: list[Future[Picture]]) -> bool:
    """Waits for them, and says whether a core is what they take."""
    seconds = computing = 0.0
    for future in pictures:
        try:
            picture = future.result(_PATIENCE)
        except TimeoutError:
            return False
        seconds, computing = seconds + picture.seconds, computing + picture.computing
    return computing >= _COMPUTES * seconds


def _to_device(pixels: np.ndarray, device: Any) -> torch.Tensor:
    tensor = torch.from_numpy(pixels)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
