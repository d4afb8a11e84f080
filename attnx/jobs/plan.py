"""Open the job in a folder: lock the folder, and plan the job if there is none."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnx.files import replacing
from attnx.jobs.attempts import forget_attempts
from attnx.jobs.job import MANIFEST, Job, Rank, check_same, differences
from attnx.jobs.locks import Lock, locked
from attnx.jobs.manifest import file_sha256, write_manifest
from attnx.jobs.runfile import RUN, read_run, write_run
from attnx.jobs.shards import DamagedError, parts
from attnx.jobs.sources import Listing
from attnx.supervisor import is_restart

__all__ = ["default_shard_size", "forget_job", "open_job", "writing"]

_SHARD_BYTES = 256 * 2**20
_LOCK = ".lock"


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
            for path in (*parts(out), *out.glob("part-*.safetensors"), out / RUN, out / MANIFEST):
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
    if alone and not parts(out) and differences(job, wanted):
        for path in (out / RUN, *out.glob("part-*.safetensors")):
            path.unlink()
        return None
    check_same(job, wanted)
    return job


def _plan(out: Path, source: Listing, run: dict[str, Any]) -> Job:
    if parts(out):
        raise ValueError(f"out: expected an empty folder or a job; {out} has shards and no {RUN}")
    forget_attempts(out)
    with replacing(out / MANIFEST) as path:
        rows = write_manifest(source.entries(), path)
        sha256 = file_sha256(path)
    # Written last: a folder with run.json counts as a job.
    write_run(out, {"rows": rows, "manifest_sha256": sha256, **run})
    job = Job(out)
    job.planned_now = True
    return job


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
