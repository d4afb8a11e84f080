"""A job in a folder: what is to be done, fixed once, and what is done. Killed and run again, it goes on.

`manifest.parquet`: every row in order. `run.json`: what the maps are made with. `part-00007.parquet`: shard 7, a slice
of the manifest, complete if it is there. `.lock` is held by whoever writes: one run, or ranks of one world together.
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
        rows: of the manifest; shard_size: rows of a shard; shards: how many there are.
        manifest_sha256: of the file of the manifest.
        lock: of the folder, for those who write.
        planned_now: whether this run has planned it.

    Raises:
        FileNotFoundError: the folder has no run.json.
        DamagedError: run.json or the manifest is not as it was written.
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
        """A row of the manifest."""
        return self.manifest.entries(row, row + 1)[0]

    def rows_of(self, shard: int) -> int:
        """How many they are."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    def part(self, shard: int) -> Path:
        """The file of a shard."""
        return self.out / part_name(shard)

    def place(self, shard: int) -> dict[str, Any]:
        """Written into a shard's file, so that no other file is taken for it."""
        return {"shard": shard, "manifest": self.manifest_sha256}

    def open_part(self, shard: int) -> Part:
        """A shard that is done.

        Raises:
            DamagedError: its file is not as it was written, or of another shard or job.
        """
        part = Part(self.part(shard))
        part.check_place(shard, self.rows_of(shard), self.manifest_sha256)
        return part

    @property
    def identity(self) -> str:
        """Tells it from jobs of other sources, settings or shard sizes."""
        made_with = json.dumps([self.manifest_sha256, self.shard_size, self.run["settings"]], sort_keys=True)
        return hashlib.sha256(made_with.encode()).hexdigest()

    def attempt(self, shard: int, died: bool = True) -> Attempt:
        """The note of a shard, see `Attempt.of`."""
        return Attempt.of(self.out, shard, self.identity, died)

    def excuse_attempts(self, rank: Rank | None = None) -> None:
        """See `Attempt.excuse`; of a rank's shards, or of all."""
        for shard in noted(self.out):
            if rank is None or shard % rank.world == rank.rank:
                self.attempt(shard, died=False).excuse()

    def check_plan(self) -> None:
        """Checks that the folder still holds this job: another run may have planned anew, where locks don't work.

        Raises:
            ValueError: it holds another one.
            OSError: the folder is gone.
        """
        if self.lock is not None:
            self.lock.check()
        now = read_run(self.out)
        if any(now[name] != self.run[name] for name in ("manifest_sha256", "shard_size", "settings")):
            raise ValueError(f"out: another run has planned {self.out} anew; choose another folder for one of them")

    def done(self) -> set[int]:
        """The shards that are there."""
        names = {path.name for path in parts(self.out)}
        return {shard for shard in range(self.shards) if self.part(shard).name in names}

    def remove_temporaries(self, rank: Rank | None = None) -> None:
        """What a kill left of a rank's shards, or of all; their writers are gone, for we hold the lock."""
        for path in self.out.glob(".part-*.tmp"):
            number = re.match(r"\.part-(\d+)-", path.name)
            if rank is None or (number is not None and int(number[1]) % rank.world == rank.rank):
                path.unlink(missing_ok=True)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises ValueError if these settings would make other maps, with each difference."""
        _check_same(self, {"settings": settings})

    def errors(self, shard: int) -> int:
        """How many rows of a done shard have an error."""
        return self.open_part(shard).errors


@dataclass(frozen=True)
class Rank:
    """One of `world` runs that share a job: it does the shards whose number modulo `world` is `rank`."""

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
    """The job of a folder, planned if it is not there yet; nobody else writes its shards inside the `with`.

    Args:
        out: made where it is missing.
        source: what is listed, once: a later run does what the manifest says.
        described: of the source, for JSON.
        settings: what decides the maps, for JSON.
        recipe: how other processes make them, for JSON; the last run's is kept.
        shard_size: rows of a shard; unless given 1024, or fewer so that their maps are at most 256 MiB, and of a job
            that is there its own.
        row_bytes: of a row's map as it is stored.
        rank: of several runs that share the job; the first of them plans, and the others wait for it.
        batch_size: images at a time, which is recorded: sums of another size may be rounded otherwise.

    Raises:
        ValueError: the job that is there has another source, other settings or another shard size, with each
            difference, and shards, or ranks; another run writes to the folder; it holds shards without a job; a wrong
            source.
        OSError: the folder can't be written to.
    """
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"shard-size: expected at least 1, got {shard_size}")
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        # pyarrow opens no others.
        raise ValueError(f"out: expected a path of UTF-8; got {os.fsencode(out)!r}") from error
    asked: dict[str, Any] = {"source": described, "settings": settings}
    if shard_size is not None:
        asked["shard_size"] = shard_size
    if not (out / RUN).exists():
        # What is no source raises before there is a folder.
        next(iter(source.entries()), None)
    with writing(out, rank) as lock:
        with locked(out / ".lock-plan", wait=True) if rank else contextlib.nullcontext():
            for left in (*out.glob(".manifest-*.tmp"), *out.glob(".run-*.tmp")):
                left.unlink()
            job = _planned(out, asked, alone=rank is None)
            if job is None:
                size = {"shard_size": default_shard_size(row_bytes), "batch_size": batch_size}
                plan = size | asked | {"recipe": recipe}
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
    """Removes the job of a folder, if there is one of this source; anything else stays."""
    if not (out / RUN).is_file():
        return
    with writing(out):
        if read_run(out)["source"] == described:
            for path in (*parts(out), *out.glob("part-*.safetensors"), out / RUN, out / _MANIFEST):
                path.unlink(missing_ok=True)
            forget_attempts(out)


def default_shard_size(row_bytes: int) -> int:
    """Rows of a shard of maps of this size."""
    return max(1, min(1024, _SHARD_BYTES // row_bytes))


def _planned(out: Path, asked: dict[str, Any], alone: bool) -> Job | None:
    """The job that is there. If it has no shard yet, and nobody else works on it, another one may take its place."""
    if not (out / RUN).exists():
        return None
    try:
        job = Job(out)
    except DamagedError as error:
        advice = "Remove it and the shards to begin anew, or choose another folder"
        raise DamagedError(error.path, f"{error.why}. {advice}") from error
    if alone and not parts(out) and _differences(job, asked):
        for path in (out / RUN, *out.glob("part-*.safetensors")):
            path.unlink()
        return None
    _check_same(job, asked)
    return job


def _plan(out: Path, source: Listing, run: dict[str, Any]) -> Job:
    if parts(out):
        raise ValueError(f"out: expected an empty folder or a job's; {out} has shards and no {RUN}")
    forget_attempts(out)
    with replacing(out / _MANIFEST) as path:
        rows = write_manifest(source.entries(), path)
        sha256 = file_sha256(path)
    # Last, for it is what says that there is a job.
    write_run(out, {"rows": rows, "manifest_sha256": sha256, **run})
    job = Job(out)
    job.planned_now = True
    return job


def _check_same(job: Job, asked: dict[str, Any]) -> None:
    if differences := _differences(job, asked):
        told = "; ".join(differences)
        raise ValueError(f"out: {job.out} holds a job with other settings. {told}. Choose another folder")


def _differences(job: Job, asked: dict[str, Any]) -> list[str]:
    now = _flat(json.loads(json.dumps(asked)))
    there = _flat({name: job.run.get(name) for name in asked})
    return [
        f"{name.removeprefix('settings.')}: {there.get(name)!r} there, {now.get(name)!r} asked"
        for name in {**there, **now}
        if there.get(name) != now.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}


@contextlib.contextmanager
def writing(out: Path, rank: Rank | None = None) -> Iterator[Lock]:
    """Makes the folder and holds it: alone, or together with the other ranks of the same world.

    A kill releases it, once all processes that were handed the descriptor of the lock are gone.
    """
    with contextlib.ExitStack() as held:
        lock = held.enter_context(locked(out / _LOCK, shared=rank is not None))
        if rank is not None:
            # Before the others': of two worlds that begin at once, each finds the other's.
            held.enter_context(locked(out / f".lock-{rank.rank}-of-{rank.world}"))
            for other in out.glob(".lock-*-of-*"):
                if not other.name.endswith(f"-of-{rank.world}"):
                    with locked(other):
                        pass
        yield lock
