"""Runs the model on batches of pictures. Batches are split if memory runs out, or if the model failed before."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from attnx.jobs.attempts import Attempt
from attnx.jobs.columns import MapRow
from attnx.jobs.decoding import Picture
from attnx.jobs.engines.queue import RunError, blame_the_model, is_fatal, why_of
from attnx.jobs.sources import Entry
from attnx.jobs.tasks import Task
from attnx.jobs.watch import Hang, Watch
from attnx.models.pixels import Pixels
from attnx.supervisor import progressed

__all__ = ["Batch", "Images", "Runner", "Stages", "on_cpu"]

Batch: TypeAlias = "list[tuple[list[Entry], Picture]]"
_Readable: TypeAlias = "tuple[list[Entry], np.ndarray]"
_ALONE = 8  # images that fail one by one, without any success, before the model is blamed


@dataclass
class Stages:
    """Seconds per stage.

    In the model's thread: images (waiting for pictures), device (copying to the device), model, and file (waiting for
    an earlier shard to be written). In parallel: decoding (sum over all processes), pack and write.
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


class Images(NamedTuple):
    """Images start <= i < stop of the shard of `attempt`."""

    attempt: Attempt
    start: int
    stop: int


@dataclass
class Runner:
    """Runs a task; a context manager. See `Worker` for the other arguments.

    Args:
        most: images per batch.
        any_map: True if the model is known to have computed at least one map.
    """

    pixels: Pixels
    task: Task
    device: Any
    most: int
    fill: bool
    say: Callable[[str], None]
    stages: Stages
    shard_timeout: float | None = None
    hang: Callable[[str, int], None] | None = None
    any_map: bool = False
    why: str = ""
    _failed_alone: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        # On a GPU, kernels may be compiled for each batch shape.
        least, first = (10.0, 0.0) if on_cpu(self.device) else (60.0, 120.0)
        self._watch = Watch(self.shard_timeout, None if self.hang is None else self._hangs, least, first)

    def __enter__(self) -> Runner:
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)

    def start(self, batch: Batch, images: Images) -> list[Callable[[], list[MapRow]]]:
        """Start the model on the readable pictures, in several parts if memory is short.

        Each returned function waits for a part and returns its results.
        """
        waits: list[Callable[[], list[MapRow]]] = []
        waiting = [(group, picture.pixels) for group, picture in batch if picture.pixels is not None]
        while waiting:
            part, full = waiting[: self.most], False
            try:
                start = time.perf_counter()
                # Always the same memory layout: another layout may change how sums are rounded.
                stacked = np.ascontiguousarray(np.stack([pixels for _, pixels in part]))
                pixels = _to_device(stacked, self.device)
                normalised = self._filled(self.pixels.normalise(pixels))
                ready = time.perf_counter()
                with self.model(images):
                    waits.append(self.task.start(normalised, [group for group, _ in part]))
                self.stages.device += ready - start
                self.stages.model += time.perf_counter() - ready
                del waiting[: len(part)]
            except torch.OutOfMemoryError:
                waiting[: len(part)] = self._halved(part)
                full = True
            # Outside the except block: there, the error still refers to the tensors.
            if full and torch.cuda.is_available():
                torch.cuda.empty_cache()
        return waits

    def start_pieces(self, batch: Batch, images: Images) -> list[Callable[[], list[MapRow]]]:
        """Like `start`, but waits for the results. A piece that fails is halved until one image is left.

        The failure becomes the error of that image.

        Raises:
            RunError: the model fails for every image.
        """
        found: list[MapRow] = []
        waiting = [(0, len(batch))]
        attempt = images.attempt
        while waiting:
            first, last = waiting.pop()
            piece = Images(attempt, images.start + first, images.start + last)
            why = attempt.why_not(piece.start, piece.stop)
            if why is None:
                try:
                    attempt.begin_piece(piece.start, piece.stop)
                    made = self._run_piece(batch, first, last, piece)
                    attempt.end_piece()
                    found += made
                    if made:
                        self.any_map = True
                        progressed()
                    continue
                except Exception as error:
                    if is_fatal(error):
                        raise
                    why = f"the model fails for this image: {why_of(error)}"[:300]
                    attempt.fail(piece.start, piece.stop, why)
            if last - first > 1:
                middle = (first + last) // 2
                waiting += [(middle, last), (first, middle)]
                continue
            self._failed_alone += 1
            self.why = why
            self.check(_ALONE, attempt)
            group, picture = batch[first]
            found += [MapRow(entry.key, error=why) for entry in group] if picture.pixels is not None else []
        return [lambda: found]

    def check(self, most: int, attempt: Attempt) -> None:
        """Check if the model itself is broken: at least `most` images failed alone and none has a map.

        In this case the failures are removed from the attempt note.

        Raises:
            RunError: the model fails for every image.
        """
        if self._failed_alone >= most and not self.any_map:
            attempt.acquit()
            raise RunError(f"the model fails for every image; the last error: {self.why}")

    def _run_piece(self, batch: Batch, first: int, last: int, images: Images) -> list[MapRow]:
        """The results for a piece of a batch.

        The images keep their positions in the batch, and copies of them replace the other images. The batch keeps its
        size, so sums are rounded as before. Captions run without the rest of the batch.
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
        waits = self.start(piece, images)
        with self.model(images):
            found = [one for wait in waits for one in wait()]
        if self.task.format.captions:
            return found
        readable = [i for i, (group, picture) in enumerate(batch) for _ in group if picture.pixels is not None]
        return [one for i, one in zip(readable, found, strict=True) if first <= i < last]

    @contextlib.contextmanager
    def model(self, images: Images) -> Iterator[None]:
        """Watch the model inside the `with`, and mark exceptions as raised by the model."""
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
        self.hang(why, where.attempt.shard)

    def _filled(self, images: torch.Tensor) -> torch.Tensor:
        if not self.fill or len(images) == self.most:
            return images
        return torch.nn.functional.pad(images, (0, 0) * (images.dim() - 1) + (0, self.most - len(images)))

    def _halved(self, part: list[_Readable]) -> list[_Readable]:
        """The part that did not fit into memory, for a retry in smaller parts. Re-raises if it can't be split."""
        if len(part) > 1:
            self.most = len(part) // 2
            self.say(f"out of memory with {len(part)} images at a time: going on with {self.most}")
            return part
        (group, pixels) = part[0]
        if len(group) == 1:
            raise
        half = len(group) // 2
        self.say(f"out of memory with {len(group)} captions of an image: going on with {half}")
        return [(group[:half], pixels), (group[half:], pixels)]


def on_cpu(device: Any) -> bool:
    """True if the device is the CPU or None."""
    return device is None or torch.device(device).type == "cpu"


def _to_device(pixels: np.ndarray, device: Any) -> torch.Tensor:
    tensor = torch.from_numpy(pixels)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
