"""The batch job on one machine: image files in, shards of maps out, in the order of the input."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnx.jobs.reading import Prepare, Progress, Read, read, read_in_order, reader_pool
from attnx.jobs.shards import ShardWriter

if TYPE_CHECKING:
    import torch

    Extract = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["Summary", "extract_images"]

_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Summary:
    """What a job did: `done` rows with a map, `failed` rows with an error, its `seconds` and `shards`.

    `cut`: rows whose caption was too long for the model, and lost words at its end.
    """

    done: int
    failed: int
    seconds: float
    shards: int
    cut: int = 0

    @property
    def per_second(self) -> float:
        """Maps a second, over the whole job; 0 for one that took no time."""
        return self.done / self.seconds if self.seconds > 0 else 0.0


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
    progress: Progress | None = None,
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
    jobs = list(zip(_keys(paths, root), paths, strict=True))
    start = time.perf_counter()
    with reader_pool(workers) as pool, ShardWriter(out, settings, rows_per_shard) as writer:
        ready = read_in_order(pool, lambda job: read(*job, prepare), jobs, _BATCHES_AHEAD * batch_size)
        while batch := list(islice(ready, batch_size)):
            _write_batch(writer, batch, extract, device)
            if progress is not None:
                progress(writer.rows, len(jobs))
    return Summary(writer.rows - writer.failed, writer.failed, time.perf_counter() - start, writer.shards)


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


def _write_batch(writer: ShardWriter, batch: list[Read], extract: Extract, device: torch.device | str | None) -> None:
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


def _stack(items: list[Read]) -> torch.Tensor:
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
