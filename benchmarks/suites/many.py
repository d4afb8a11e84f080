"""A job of many rows without a model and decoders.

Manifest, queues, packing, Parquet and fsync are real; pixels and maps are constant. Resident memory and the rate are
stored after every tenth of the rows.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attnx
from attnx.jobs.decoding import Decoders, Picture
from attnx.jobs.plan import open_job
from attnx.jobs.sources import Entry
from attnx.jobs.tasks import ImageTask
from attnx.jobs.worker import Worker
from attnx.models.pixels import Pixels


class Numbers:
    """A source of `count` entries without files, with names like those of a large data set."""

    def __init__(self, count: int) -> None:
        self._count = count

    def entries(self) -> Iterator[Entry]:
        for i in range(self._count):
            name = f"train/{i // 1000:06d}/{i:09d}.jpg"
            yield Entry(name, name)


class NoDecoders(Decoders):
    """Decoders that return the same image for every entry."""

    def __init__(self) -> None:
        self.workers = 0
        self._future: Future[Picture] = Future()
        self._future.set_result(Picture(np.zeros((3, 2, 2), np.uint8), 640, 480, (0.0, 0.0, 640.0, 480.0)))

    def submit(self, entry: Entry) -> Future[Picture]:
        return self._future


def many(count: int, out: Path) -> dict[str, Any]:
    """Times of a job of `count` rows without a model: planning, writing, resuming, reading."""
    maps = torch.rand(256, 14, 14, generator=torch.Generator().manual_seed(0))
    pixels, task = Pixels("whole", (2, 2), (0.0,) * 3, (1.0,) * 3, "bilinear"), ImageTask(lambda x: maps[: len(x)])
    marks: list[dict[str, Any]] = []
    start = time.perf_counter()
    with open_job(out, Numbers(count), {}, {"model": "none"}) as job:
        planned, resident = time.perf_counter() - start, _resident()
        with Worker(job, NoDecoders(), pixels, task, None, 256) as worker:
            begin = last = time.perf_counter()
            every = max(1, job.shards // 10)
            for shard in range(job.shards):
                made = worker.run_shard(shard, shard + 1 if shard + 1 < job.shards else None)
                if (shard + 1) % every == 0:
                    made.result()
                    rows, now = (shard + 1) * job.shard_size, time.perf_counter()
                    rate = 1e6 * (now - last) / (every * job.shard_size)
                    marks.append({"rows": rows, "us_per_row": rate, "resident_mb": _resident()})
                    last = now
        seconds = time.perf_counter() - begin
        shards = job.shards
    size = sum(path.stat().st_size for path in out.glob("part-*.parquet"))
    return {
        "rows": count, "shards": shards, "plan_s": planned, "resident_after_plan_mb": resident, "make_s": seconds,
        "marks": marks, **_read_again(out, count), "bytes_per_row": size / count,
        "manifest_bytes_per_row": (out / "manifest.parquet").stat().st_size / count,
    }  # fmt: skip


def _read_again(out: Path, count: int) -> dict[str, float]:
    """Times of resuming a finished job and of reading its rows."""

    def missing() -> int:
        with open_job(out, Numbers(count), {}, {"model": "none"}) as job:
            return job.shards - len(job.done())

    left, resumed = _timed(missing)
    rows, opening = _timed(lambda: attnx.open(out))
    key = rows[count // 2].key
    same, first_key = _timed(lambda: rows[key].key)
    assert (left, len(rows), same) == (0, count, key)
    _, random = _timed(lambda: [rows[int(i)] for i in np.random.default_rng(0).integers(0, count, 200)])
    return {"resume_s": resumed, "open_s": opening, "first_key_s": first_key, "random_row_ms": 1e3 * random / 200}


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _resident() -> float:
    """Resident megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6
