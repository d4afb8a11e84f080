"""A job in a folder: what is to be done, fixed once, and what is done. Killed and run again, it goes on.

`manifest.parquet`: every row in order. `run.json`: what the maps are made with. `part-00007.parquet`: shard 7, a slice
of the manifest, complete if it is there. `.lock`: held by the one job that writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from attnx.jobs.manifest import Manifest, write_manifest
from attnx.jobs.shards import parts, sync_folder
from attnx.jobs.sources import Entry, Source

__all__ = ["Job", "open_job"]

_MANIFEST, _RUN, _LOCK = "manifest.parquet", "run.json", ".lock"


class Job:
    """A planned job. rows: of the manifest; shard_size: rows of a shard; shards: how many."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run: dict[str, Any] = json.loads((out / _RUN).read_text(encoding="utf-8"))
        self.manifest = Manifest(out / _MANIFEST)
        self.rows = len(self.manifest)
        self.shard_size = int(self.run["shard_size"])
        self.shards = -(-self.rows // self.shard_size)

    def entries(self, shard: int) -> list[Entry]:
        """The rows of a shard."""
        return self.manifest.entries(shard * self.shard_size, (shard + 1) * self.shard_size)

    def rows_of(self, shard: int) -> int:
        """How many they are."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    def part(self, shard: int) -> Path:
        """The file of a shard."""
        return self.out / f"part-{shard:05d}.parquet"

    def todo(self) -> list[int]:
        """The shards that are not done."""
        done = {path.name for path in parts(self.out)}
        return [shard for shard in range(self.shards) if self.part(shard).name not in done]

    def failed(self) -> list[int]:
        """The done shards that have rows with an error."""
        return [shard for shard in range(self.shards) if self.part(shard).exists() and self.errors(shard)]

    def errors(self, shard: int) -> int:
        """How many rows of a done shard have an error."""
        import pyarrow.parquet as pq

        column = pq.read_table(self.part(shard), columns=["error"]).column("error")
        return len(column) - int(column.null_count)


@contextlib.contextmanager
def open_job(
    out: Path, source: Source, described: dict[str, Any], settings: dict[str, Any], shard_size: int | None = None
) -> Iterator[Job]:
    """The job of a folder, planned if it is not there yet; nobody else writes to it inside the `with`.

    Args:
        out: made where it is missing.
        source: what is listed, once: a later run does what the manifest says.
        described: of the source, for JSON.
        settings: what decides the maps, for JSON.
        shard_size: rows of a shard, 1024 unless given; of a job that is there, its own.

    Raises:
        ValueError: the job that is there has another source, other settings or another shard size, with each
            difference; another job writes to the folder; it holds shards without a job; a wrong source.
        OSError: the folder can't be written to.
    """
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard-size: expected at least 1, got {shard_size}")
    _make(out)
    with _locked(out):
        _remove_temporaries(out)
        if (out / _RUN).exists():
            job = Job(out)
            _check_same(job, {"source": described, "settings": settings}, shard_size)
        else:
            job = _plan(out, source, {"source": described, "settings": settings}, shard_size or 1024)
        yield job


def _plan(out: Path, source: Source, run: dict[str, Any], shard_size: int) -> Job:
    if parts(out):
        raise ValueError(f"out: expected an empty folder or a job's; {out} has shards and no {_RUN}")
    temporary = out / f".{_MANIFEST}-{uuid.uuid4().hex}.tmp"
    try:
        rows = write_manifest(source.entries(), temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(out / _MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    # Last, for it is what says that there is a job.
    _write_json(out / _RUN, {**run, "rows": rows, "shard_size": shard_size})
    return Job(out)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _check_same(job: Job, asked: dict[str, Any], shard_size: int | None) -> None:
    asked = json.loads(json.dumps(asked))
    there = {**_flat(job.run["source"], "source"), **_flat(job.run["settings"])}
    now = {**_flat(asked["source"], "source"), **_flat(asked["settings"])}
    if shard_size is not None:
        there["shard_size"], now["shard_size"] = job.shard_size, shard_size
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    if names:
        told = "; ".join(f"{name}: {there.get(name)!r} there, {now.get(name)!r} asked" for name in names)
        raise ValueError(f"out: {job.out} holds a job with other settings. {told}. Choose another folder")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _LOCK).open("a").close()
    except OSError as error:
        message = f"out: expected a folder that can be written to ({error.strerror})"
        raise OSError(error.errno, message, str(out)) from error


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Held by the process: a kill releases it."""
    import fcntl

    with (out / _LOCK).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out: another job writes to {out}; wait for it, or choose another folder") from error
        yield


def _remove_temporaries(out: Path) -> None:
    """What a kill left behind; its writer is gone, for we hold the lock."""
    for pattern in (".part-*.tmp", f".{_MANIFEST}-*.tmp", f".{_RUN}-*.tmp"):
        for path in out.glob(pattern):
            path.unlink()


def first_entries(source: Source, count: int) -> tuple[list[Entry], int]:
    """The first entries of a source, and how many it has."""
    entries = source.entries()
    first = list(islice(entries, count))
    return first, len(first) + sum(1 for _ in entries)
