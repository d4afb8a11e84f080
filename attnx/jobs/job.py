"""A job in a folder: a fixed plan and the finished shards. A job that was killed continues when it is run again.

- `manifest.parquet`: all rows in order.
- `run.json`: the settings that determine the maps.
- `part-00007.parquet`: shard 7, a slice of the manifest. If the file exists, it is complete.
- `.lock`: held by the run that writes, or shared by the ranks of one world.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnx.files import replacing
from attnx.jobs.attempts import Attempt, forget_attempts, noted
from attnx.jobs.locks import Lock, locked
from attnx.jobs.manifest import Manifest, file_sha256, write_manifest
from attnx.jobs.runfile import RUN, read_run, write_run
from attnx.jobs.shards import DamagedError, Part, part_name, parts
from attnx.jobs.sources import Entry, Listing
from attnx.supervisor import is_restart

__all__ = ["Job", "Rank", "default_shard_size", "forget_job", "open_job", "writing"]

_SHARD_BYTES = 256 * 2**20
_MANIFEST, _LOCK = "manifest.parquet", ".lock"


class Job:
    """A planned job.

    Attributes:
        rows: number of rows in the manifest.
        shard_size: rows per shard.
        shards: number of shards.
        manifest_sha256: SHA-256 of the manifest's file.
        lock: the lock of the folder; None for readers.
        planned_now: True if this run made the plan.

    Raises:
        FileNotFoundError: the folder has no run.json.
        DamagedError: run.json or the manifest is damaged.
        ValueError: a newer attnx wrote the folder.
    """

    lock: Lock | None = None
    planned_now = False

    def __init__(self, out: Path) -> None:
        self.out = out
        self.run: dict[str, Any] = read_run(out)
        self.manifest_sha256: str = self.run["manifest_sha256"]
        self.rows: int = self.run["rows"]
        self.shard_size: int = self.run["shard_size"]
        self.shards = -(-self.rows // self.shard_size)
        self.manifest = Manifest(out / _MANIFEST, self.manifest_sha256, self.rows)

    def entries(self, shard: int) -> list[Entry]:
        """The rows of a shard."""
        return self.manifest.entries(shard * self.shard_size, (shard + 1) * self.shard_size)

    def entry(self, row: int) -> Entry:
        """One row of the manifest."""
        return self.manifest.entries(row, row + 1)[0]

    def rows_of(self, shard: int) -> int:
        """The number of rows of a shard."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    def part(self, shard: int) -> Path:
        """The file of a shard."""
        return self.out / part_name(shard)

    def place(self, shard: int) -> dict[str, Any]:
        """The shard's number and the manifest's hash. They are written into its file to detect mixed-up files."""
        return {"shard": shard, "manifest": self.manifest_sha256}

    def open_part(self, shard: int) -> Part:
        """A finished shard.

        Raises:
            DamagedError: its file is damaged, or belongs to another shard or job.
        """
        part = Part(self.part(shard))
        part.check_place(shard, self.rows_of(shard), self.manifest_sha256)
        return part

    @property
    def identity(self) -> str:
        """A hash of the manifest, the shard size and the settings. It differs between different jobs."""
        content = json.dumps([self.manifest_sha256, self.shard_size, self.run["settings"]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def attempt(self, shard: int, died: bool = True) -> Attempt:
        """The attempt note of a shard, see `Attempt.of`."""
        return Attempt.of(self.out, shard, self.identity, died)

    def excuse_attempts(self, rank: Rank | None = None) -> None:
        """Excuse the notes of a rank's shards, or of all shards. See `Attempt.excuse`."""
        for shard in noted(self.out):
            if rank is None or shard % rank.world == rank.rank:
                self.attempt(shard, died=False).excuse()

    def check_plan(self) -> None:
        """Check that the folder still holds this job. Without working locks, another run may have replaced it.

        Raises:
            ValueError: the folder holds another job.
            OSError: the folder is gone.
        """
        if self.lock is not None:
            self.lock.check()
        now = read_run(self.out)
        if any(now[name] != self.run[name] for name in ("manifest_sha256", "shard_size", "settings")):
            raise ValueError(f"out: another run replaced the job in {self.out}; choose another folder for one of them")

    def done(self) -> set[int]:
        """The numbers of the finished shards."""
        names = {path.name for path in parts(self.out)}
        return {shard for shard in range(self.shards) if self.part(shard).name in names}

    def remove_temporaries(self, rank: Rank | None = None) -> None:
        """Remove temporary files that a kill left, of a rank's shards or of all.

        No other process writes them, because this run holds the lock.
        """
        for path in self.out.glob(".part-*.tmp"):
            number = re.match(r"\.part-(\d+)-", path.name)
            if rank is None or (number is not None and int(number[1]) % rank.world == rank.rank):
                path.unlink(missing_ok=True)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ValueError if these settings differ from the job's. The message lists the differences."""
        _check_same(self, {"settings": settings})

    def errors(self, shard: int) -> int:
        """The number of rows with an error in a finished shard."""
        return self.open_part(shard).errors


@dataclass(frozen=True)
class Rank:
    """One of `world` runs that share a job. It makes the shards whose number modulo `world` is `rank`."""

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: expected 0 <= rank < world; got rank {self.rank} of a world of {self.world}")


@contextlib.contextmanager
def open_job(
    out: Path,
    source: Listing,
    described: dict[str, Any],
    settings: dict[str, Any],
    recipe: dict[str, Any] | None = None,
    shard_size: int | None = None,
    row_bytes: int = 1,
    rank: Rank | None = None,
    batch_size: int | None = None,
) -> Iterator[Job]:
    """The job in a folder; it is planned first if there is none. No other run writes its shards inside the `with`.

    Args:
        out: folder; created if it is missing.
        source: listed once, when the job is planned. Later runs follow the manifest.
        described: description of the source, for JSON.
        settings: everything that determines the maps, for JSON.
        recipe: the recipe that other processes load, for JSON. The last run's recipe is kept.
        shard_size: rows per shard. The default is an existing job's own size, else at most 1024 such that the maps of
            a shard have at most 256 MiB.
        row_bytes: bytes of one stored map.
        rank: this run's rank if several runs share the job. The first one plans, the others wait.
        batch_size: images per batch. It is recorded because another size may change how sums are rounded.

    Raises:
        ValueError: the existing job has shards or ranks, and another source, other settings or another shard size
            (the message lists the differences); another run writes to the folder; the folder has shards without a
            job; the source is invalid.
        OSError: the folder is not writable.
    """
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard-size: expected at least 1, got {shard_size}")
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        # pyarrow only opens paths in UTF-8.
        raise ValueError(f"out: expected a path in UTF-8; got {os.fsencode(out)!r}") from error
    wanted: dict[str, Any] = {"source": described, "settings": settings}
    if shard_size is not None:
        wanted["shard_size"] = shard_size
    if not (out / RUN).exists():
        # An invalid source raises before the folder is created.
        next(iter(source.entries()), None)
    with writing(out, rank) as lock:
        with locked(out / ".lock-plan", wait=True) if rank else contextlib.nullcontext():
            for temporary in (*out.glob(".manifest-*.tmp"), *out.glob(".run-*.tmp")):
                temporary.unlink()
            job = _existing_job(out, wanted, alone=rank is None)
            if job is None:
                size = {"shard_size": default_shard_size(row_bytes), "batch_size": batch_size}
                plan = size | wanted | {"recipe": recipe}
                job = _plan(out, source, plan)
            elif job.run["recipe"] != json.loads(json.dumps(recipe)):
                job.run["recipe"] = recipe
                write_run(out, job.run)
        job.remove_temporaries(rank)
        if not is_restart():
            job.excuse_attempts(rank)
        job.lock = lock
        yield job


def forget_job(out: Path, described: dict[str, Any]) -> None:
    """Remove the job in a folder if its source matches. Other files stay."""
    if not (out / RUN).is_file():
        return
    with writing(out):
        if read_run(out)["source"] == described:
            for path in (*parts(out), *out.glob("part-*.safetensors"), out / RUN, out / _MANIFEST):
                path.unlink(missing_ok=True)
            forget_attempts(out)


def default_shard_size(row_bytes: int) -> int:
    """The default number of rows per shard for maps of `row_bytes` bytes."""
    return max(1, min(1024, _SHARD_BYTES // row_bytes))


def _existing_job(out: Path, wanted: dict[str, Any], alone: bool) -> Job | None:
    """The job in the folder, else None. A different job without shards is removed if no other rank works on it."""
    if not (out / RUN).exists():
        return None
    try:
        job = Job(out)
    except DamagedError as error:
        advice = "Remove it and the shards to start over, or choose another folder"
        raise DamagedError(error.path, f"{error.why}. {advice}") from error
    if alone and not parts(out) and _differences(job, wanted):
        for path in (out / RUN, *out.glob("part-*.safetensors")):
            path.unlink()
        return None
    _check_same(job, wanted)
    return job


def _plan(out: Path, source: Listing, run: dict[str, Any]) -> Job:
    if parts(out):
        raise ValueError(f"out: expected an empty folder or a job; {out} has shards and no {RUN}")
    forget_attempts(out)
    with replacing(out / _MANIFEST) as path:
        rows = write_manifest(source.entries(), path)
        sha256 = file_sha256(path)
    # Written last: a folder with run.json counts as a job.
    write_run(out, {"rows": rows, "manifest_sha256": sha256, **run})
    job = Job(out)
    job.planned_now = True
    return job


def _check_same(job: Job, wanted: dict[str, Any]) -> None:
    if differences := _differences(job, wanted):
        message = "; ".join(differences)
        raise ValueError(f"out: {job.out} holds a job with other settings. {message}. Choose another folder")


def _differences(job: Job, wanted: dict[str, Any]) -> list[str]:
    new = _flat(json.loads(json.dumps(wanted)))
    old = _flat({name: job.run.get(name) for name in wanted})
    return [
        f"{name.removeprefix('settings.')}: {old.get(name)!r} in the job, {new.get(name)!r} now"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one flat dict with dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}


@contextlib.contextmanager
def writing(out: Path, rank: Rank | None = None) -> Iterator[Lock]:
    """Create the folder and lock it, exclusively or shared with the other ranks of the same world.

    After a kill the lock is released when all processes with its descriptor have ended.
    """
    with contextlib.ExitStack() as held:
        lock = held.enter_context(locked(out / _LOCK, shared=rank is not None))
        if rank is not None:
            # Own lock first: if two worlds start at once, each finds the other's lock.
            held.enter_context(locked(out / f".lock-{rank.rank}-of-{rank.world}"))
            for other in out.glob(".lock-*-of-*"):
                if not other.name.endswith(f"-of-{rank.world}"):
                    with locked(other):
                        pass
        yield lock
