"""Run a job: make the missing shards with an engine, and report the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

from attnx.jobs.attempts import forget_attempts
from attnx.jobs.engines.cluster import Cluster, run_on_cluster
from attnx.jobs.engines.in_process import run_in_process
from attnx.jobs.engines.local import run_on_devices
from attnx.jobs.engines.queue import Shards
from attnx.jobs.job import Job, Rank
from attnx.jobs.options import RunOptions
from attnx.jobs.progress import Progress
from attnx.jobs.runtime import Runtime
from attnx.jobs.shards import DamagedError, set_aside, strays
from attnx.jobs.tensors import tensors_of
from attnx.jobs.worker import ShardResult, Stages

__all__ = ["Report", "run_job"]

_VERIFIED = 2**30  # bytes; so many are read in a second or two


@dataclass(frozen=True)
class Report:
    """The result of a run. Counts are for the shards of this run's rank, or for the whole job.

    Attributes:
        rows, maps, errors: number of rows, of rows with a map, and of rows with an error.
        before: number of rows from earlier runs.
        made: number of rows made in this run.
        makers: number of processes or actors that made shards in parallel.
        seconds: wall time.
        stages: time of each stage.
        set_aside: the reason for each shard that could not be made.
        first_error: key and error of the first row with an error.
    """

    rows: int
    maps: int
    errors: int
    before: int
    made: int
    makers: int
    seconds: float
    stages: Stages
    set_aside: dict[int, str]
    first_error: tuple[str, str] | None = None

    def stage_table(self) -> str:
        """The time of each stage, one line each: in the model threads, then in parallel to them."""
        stages, seconds = self.stages, max(self.seconds * self.makers, 1e-9)
        waited = {
            "waiting for images": stages.images, "to the device": stages.device, "model": stages.model,
            "waiting for files": stages.file,
        }  # fmt: skip
        waited["starting, ending"] = seconds - sum(waited.values())
        parallel = {"decoding": stages.decoding, "packing": stages.pack, "writing": stages.write}
        lines = [f"  {name:<20}{value:9.1f} s {100 * value / seconds:5.0f} %" for name, value in waited.items()]
        lines += [f"  {name:<20}{value:9.1f} s   (parallel to the model)" for name, value in parallel.items()]
        return "\n".join(lines)


def run_job(
    runtime: Runtime,
    job: Job,
    options: RunOptions,
    *,
    devices: Sequence[str] = (),
    cluster: Cluster | None = None,
    rank: Rank | None = None,
    tries: int = 3,
    retry_failed: bool = False,
    made_now: Container[int] = (),
    progress: Progress | None = None,
    note: Callable[[ShardResult], None] | None = None,
    say: Callable[[str], None] = print,
    verify: bool | None = None,
    hang: Callable[[str, int], None] | None = None,
) -> Report:
    """Make the missing shards; with `retry_failed` also the rows with an error.

    Args:
        runtime: makes the maps in this process.
        devices: if there are several, each gets a process.
        cluster: if given, actors of a Ray cluster make the shards.
        rank: this run's rank if several runs share the job.
        tries: failures of a shard before it is made in pieces, see `attnx.jobs.attempts`.
        made_now: shards whose failed rows an earlier process of this run has retried.
        progress: called as progress(done, total) after every shard, in rows; done includes earlier runs.
        note: called with the `ShardResult` of every written shard.
        say: called with messages about unusual events.
        verify: True: read the existing shards in full. False: check their footers and sizes. None: read them in full
            if they have at most 1 GiB. Damaged shards are set aside and made again.
        hang: called as hang(why, shard) when the model hangs. It must end this process; a new process continues the
            job. None: hangs are not detected.

    Raises:
        OSError: the disk is full; finished shards are complete.
        RunError: several shards in a row failed, or the engine failed.
    """
    start = time.perf_counter()
    ours = range(job.shards) if rank is None else range(rank.rank, job.shards, rank.world)
    if rank is None or rank.rank == 0:
        _move_strays(job, say)
    finished = _undamaged(job, sorted(job.done() & set(ours)), verify, say)
    todo = [shard for shard in ours if shard not in finished]
    rows = sum(map(job.rows_of, ours))
    before = rows - sum(map(job.rows_of, todo))
    if retry_failed:
        todo += [shard for shard, errors in finished.items() if errors and shard not in made_now]
    made, counts = 0, dict(finished)

    def advance(one: ShardResult) -> None:
        nonlocal made
        made += one.rows
        # A retried shard keeps the maps of its rows without an error.
        counts[one.shard] = one.errors
        if note is not None:
            note(one)
        if progress is not None:
            progress(min(before + made, rows), rows)

    if progress is not None:
        progress(before, rows)
    shards, options = Shards(todo, tries, say, bool(finished)), replace(options, tries=tries)
    stages, makers = Stages(), 1
    try:
        if todo and cluster is not None:
            stages, makers = run_on_cluster(job, cluster, shards, options, advance)
        elif todo and len(devices) > 1:
            stages, makers = run_on_devices(job, devices, shards, options, advance), len(devices)
        elif todo:
            stages = run_in_process(runtime, job, shards, options, advance, say, hang)
    finally:
        # Processes and actors that died leave temporary files.
        job.remove_temporaries(rank)
        with contextlib.suppress(OSError):
            forget_attempts(job.out, job.done() & set(ours))
    counts = {shard: counts[shard] for shard in ours if shard not in shards.set_aside}
    failed = sum(counts.values())
    maps = sum(map(job.rows_of, counts)) - failed
    first = next((_first_error(job, shard) for shard, errors in counts.items() if errors), None)
    seconds = time.perf_counter() - start
    return Report(rows, maps, failed, before, made, makers, seconds, stages, shards.set_aside, first)


def _move_strays(job: Job, say: Callable[[str], None]) -> None:
    """Set aside files that look like shards but are not of this job."""
    for path in strays(job.out, job.shards):
        say(f"{path} is not a shard of this job; it was moved to {set_aside(path)}")


def _undamaged(job: Job, shards: list[int], verify: bool | None, say: Callable[[str], None]) -> dict[int, int]:
    """The number of rows with an error for each undamaged shard; damaged shards are set aside."""
    if verify is None:
        files = (path for shard in shards for path in (job.part(shard), tensors_of(job.part(shard))))
        verify = sum(path.stat().st_size for path in files if path.exists()) <= _VERIFIED
    good = {}
    for shard in shards:
        try:
            part = job.open_part(shard)
            part.check(verify)
            good[shard] = part.errors
        except DamagedError as error:
            folder = set_aside(job.part(shard))
            say(f"{error}; it was moved to {folder}, and shard {shard} is made again")
    return good


def _first_error(job: Job, shard: int) -> tuple[str, str]:
    rows = job.open_part(shard).table(["key", "error"]).to_pylist()
    return next((row["key"], row["error"]) for row in rows if row["error"] is not None)
