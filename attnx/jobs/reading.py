"""What the batch jobs share: images decoded and prepared in threads, ahead of the model, in order; a progress bar."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from PIL import Image

from attnx.images import ImageError, read_image
from attnx.jobs.decoding import usable_cores

if TYPE_CHECKING:
    import torch

__all__ = ["Prepare", "Progress", "Read", "progress_bar", "read", "read_in_order", "reader_pool"]

Prepare: TypeAlias = "Callable[[Image.Image], torch.Tensor]"
Progress: TypeAlias = Callable[[int, int], None]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Read:
    """A picture as the model takes it, [3, h, w], and its size in pixels; or why it could not be read."""

    key: str
    tensor: torch.Tensor | None
    width: int | None = None
    height: int | None = None
    error: str | None = None


def read(key: str, path: Path, prepare: Prepare) -> Read:
    """The image of a file, prepared; a file that is none gives the error."""
    try:
        image = read_image(path)
    except ImageError as error:
        return Read(key, None, error=str(error))
    return Read(key, prepare(image), image.width, image.height)


@contextlib.contextmanager
def reader_pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that decode and prepare: the number of usable cores unless given, at most 16.

    Raises:
        ValueError: fewer than one.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    pool = ThreadPoolExecutor(workers or min(16, usable_cores()), thread_name_prefix="attnx-decode")
    try:
        yield pool
    finally:
        # What is queued would otherwise all be decoded before an interrupt gets through.
        pool.shutdown(cancel_futures=True)


def read_in_order(
    pool: ThreadPoolExecutor, load: Callable[[_Job], _Result], jobs: Iterable[_Job], ahead: int
) -> Iterator[_Result]:
    """The jobs' results in their order; at most `ahead` of them are under way or wait."""
    waiting = iter(jobs)
    running: deque[Future[_Result]] = deque(pool.submit(load, job) for job in islice(waiting, ahead))
    while running:
        result = running.popleft().result()
        running.extend(pool.submit(load, job) for job in islice(waiting, 1))
        yield result


@contextlib.contextmanager
def progress_bar(total: int, unit: str = "images") -> Iterator[Progress]:
    """A `progress` for a job that draws a bar with images/s and the time left to stderr.

    Args:
        total: images in the job. Each call's own total takes its place.
        unit: what is counted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} " + f"{unit}/s")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TextColumn("ETA"), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate=0.0)

        def advance(done: int, total: int) -> None:
            seconds = max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=done / seconds)

        yield advance
