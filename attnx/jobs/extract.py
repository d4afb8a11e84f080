"""The batch job on one machine: image files in, shards of maps out, in the order of the input."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from attnx.images import ImageError, read_image
from attnx.jobs.shards import ShardWriter

if TYPE_CHECKING:
    import torch

    Prepare = Callable[[Image.Image], torch.Tensor]
    Extract = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["Summary", "extract_images", "progress_bar"]

_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Summary:
    """What a job did: `done` rows with a map, `failed` rows with an error, its `seconds` and `shards`."""

    done: int
    failed: int
    seconds: float
    shards: int

    @property
    def images_per_second(self) -> float:
        """Maps a second, over the whole job; 0 for one that took no time."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class _Loaded:
    key: str
    tensor: torch.Tensor | None
    width: int | None = None
    height: int | None = None
    error: str | None = None


def extract_images(
    paths: Sequence[Path],
    root: Path,
    prepare: Prepare,
    extract: Extract,
    out: Path,
    settings: dict[str, Any],
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    rows_per_shard: int = 4096,
) -> Summary:
    """Writes one row an image to `out`, in the order of `paths`, and says how it went.

    An image that can't be read, or whose map float16 can't hold, becomes a row with an error, and the job
    goes on. Any other exception, KeyboardInterrupt included, ends the job after the rows of all batches
    before it are written.

    Args:
        paths: the images, each once, all under `root`. A row's key is the path relative to `root`, with `/`;
            bytes of a name that are not UTF-8 are written as `\\xff`.
        root: the folder that keys are relative to, or the image itself when there is only one.
        prepare: upright RGB picture -> [3, h, w] float, the same h and w for all. Called from several
            threads.
        extract: [B, 3, h, w] -> [B, ...] float maps, any device; B <= batch_size, smaller where images
            failed. It decides on `torch.inference_mode` itself: some methods need gradients.
        out, settings, rows_per_shard: as for `ShardWriter`.
        batch_size: at least 1.
        device: where batches go before `extract`; None leaves them on the CPU.
        progress: called as progress(done, total) after every batch; done counts all rows so far, failed ones
            too.
        workers: threads that decode and prepare; by default the number of usable cores, at most 16.

    Raises:
        ValueError: a wrong argument; a tensor or map of a wrong shape or dtype, with the key it belongs to.
        OSError: `out` can't be written to; known before the first image is read.
    """
    if not paths:
        raise ValueError("paths: expected at least one image, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    jobs = list(zip(_keys(paths, root), paths, strict=True))
    start = time.perf_counter()
    pool = ThreadPoolExecutor(workers or min(16, _usable_cores()), thread_name_prefix="attnx-decode")
    try:
        with ShardWriter(out, settings, rows_per_shard) as writer:
            loaded = _in_order(pool, lambda job: _load(*job, prepare), jobs, _BATCHES_AHEAD * batch_size)
            while batch := list(islice(loaded, batch_size)):
                _write_batch(writer, batch, extract, device)
                if progress is not None:
                    progress(writer.rows, len(jobs))
    finally:
        # What is queued would otherwise all be decoded before an interrupt gets through.
        pool.shutdown(cancel_futures=True)
    return Summary(writer.rows - writer.failed, writer.failed, time.perf_counter() - start, writer.shards)


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """A `progress` for `extract_images` that draws a bar with images/s and the time left to stderr.

    Args:
        total: images in the job. Each call's own total takes its place.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} images/s")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TextColumn("ETA"), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate=0.0)

        def advance(done: int, total: int) -> None:
            seconds = max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=done / seconds)

        yield advance


def _keys(paths: Sequence[Path], root: Path) -> list[str]:
    keys = []
    for path in paths:
        if not path.is_relative_to(root):
            raise ValueError(f"paths: expected paths under root {root}, got {path}")
        key = path.name if path == Path(root) else path.relative_to(root).as_posix()
        # Parquet strings are UTF-8; a POSIX file name is any bytes.
        keys.append(os.fsencode(key).decode(errors="backslashreplace"))
    if len(set(keys)) < len(keys):
        key, times = Counter(keys).most_common(1)[0]
        raise ValueError(f"paths: expected every image once, got {key!r} {times} times")
    return keys


def _usable_cores() -> int:
    # A container or a job scheduler may allow fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(
    pool: ThreadPoolExecutor,
    load: Callable[[tuple[str, Path]], _Loaded],
    jobs: Iterable[tuple[str, Path]],
    ahead: int,
) -> Iterator[_Loaded]:
    waiting = iter(jobs)
    running: deque[Future[_Loaded]] = deque(pool.submit(load, job) for job in islice(waiting, ahead))
    while running:
        result = running.popleft().result()
        running.extend(pool.submit(load, job) for job in islice(waiting, 1))
        yield result


def _load(key: str, path: Path, prepare: Prepare) -> _Loaded:
    try:
        image = read_image(path)
    except ImageError as error:
        return _Loaded(key, None, error=str(error))
    return _Loaded(key, prepare(image), image.width, image.height)


def _write_batch(
    writer: ShardWriter, batch: list[_Loaded], extract: Extract, device: torch.device | str | None
) -> None:
    import torch

    good = [item for item in batch if item.error is None]
    maps: Iterator[Any] = iter(())
    if good:
        # [B, 3, h, w] -> [B, ...]
        result = extract(_stack(good).to(device=device))
        expected = f"extract: expected a float tensor [{len(good)}, ...] for {good[0].key!r} and on"
        if not isinstance(result, torch.Tensor) or not result.is_floating_point():
            raise ValueError(f"{expected}, got {_describe(result)}")
        if result.shape[:1] != (len(good),):
            raise ValueError(f"{expected}, got {_describe(result)}")
        maps = iter(result.detach().to("cpu", torch.float32).numpy())
    for item in batch:
        amap = next(maps) if item.error is None else None
        writer.add(item.key, amap, item.width, item.height, item.error)


def _stack(items: list[_Loaded]) -> torch.Tensor:
    import torch

    tensors: list[torch.Tensor] = []
    for item in items:
        tensor = item.tensor
        expected = f"prepare: expected a float tensor {list(tensors[0].shape) if tensors else '[3, h, w]'}"
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{expected} for {item.key!r}, got {_describe(tensor)}")
        if tensor.ndim != 3 or tensor.shape[0] != 3 or (tensors and tensor.shape != tensors[0].shape):
            raise ValueError(f"{expected} for {item.key!r}, got {_describe(tensor)}")
        tensors.append(tensor)
    return torch.stack(tensors)


def _describe(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ if shape is None else f"{dtype} {list(shape)}"
