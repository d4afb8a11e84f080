"""A run of a job: what is left of it, by an engine, and how it went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

from attnx.jobs.attempts import forget_attempts
from attnx.jobs.engines.cluster import Cluster, run_on_cluster
from attnx.jobs.engines.in_process import run_here
from attnx.jobs.engines.local import run_on_devices
from attnx.jobs.engines.queue import Shards
from attnx.jobs.job import Job, Rank
from attnx.jobs.progress import Progress
from attnx.jobs.recipe import RunOptions, Runtime
from attnx.jobs.shards import DamagedError, set_aside, strays
from attnx.jobs.tensors import tensors_of
from attnx.jobs.worker import ShardResult, Stages

__all__ = ["Report", "run_job"]

_VERIFIED = 2**30  # bytes of shards that are read in a second or two


@dataclass(frozen=True)
class Report:
    """How a run went. Of its part of the job: rows, those of them with a map, with an error, and that were done before.

    made: rows that were done in this run. makers: how many processes or actors made them at a time. set_aside: the
    reason, for each shard that can't be made. first_error: key and error of the first row that has one.
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
        """Where the time went, a line a stage: of the threads that run models, and beside them."""
        stages, seconds = self.stages, max(self.seconds * self.makers, 1e-9)
        waited = {
            "waiting for images": stages.images, "to the device": stages.device, "model": stages.model,
            "waiting for files": stages.file,
        }  # fmt: skip
        waited["starting, ending"] = seconds - sum(waited.values())
        beside = {"decoding": stages.decoding, "packing": stages.pack, "writing": stages.write}
        lines = [f"  {name:<20}{value:9.1f} s {100 * value / seconds:5.0f} %" for name, value in waited.items()]
        lines += [f"  {name:<20}{value:9.1f} s   (beside the model)" for name, value in beside.items()]
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
    """Does what is left: the shards that are not there, or with `retry_failed` also rows with an error.

    Args:
        runtime: what makes maps in this process.
        devices: more than one: a process for each.
        cluster: actors make the shards.
        rank: of several runs that share the job.
        tries: of a shard; then it is made in pieces, see `attnx.jobs.attempts`.
        made_now: shards whose failed rows this run has done again, in a process before this one.
        progress: called as progress(done, total) rows after every shard; done counts those of earlier runs.
        note: called with every shard that was written.
        say: is told what is out of the ordinary.
        verify: reads all of the shards that are there. Unless given, if they have at most 1 GiB; of others the footers
            and sizes are checked. A damaged one is set aside, and made again.
        hang: called as hang(why, shard) when the model hangs; it ends this process, and another one goes on with the
            job. None: nothing is done.

    Raises:
        OSError: the disk is full; what was written is whole.
        RunError: one shard after another fails, or what makes them does.
    """
    start = time.perf_counter()
    ours = range(job.shards) if rank is None else range(rank.rank, job.shards, rank.world)
    for path in strays(job.out, job.shards) if rank is None or rank.rank == 0 else ():
        say(f"{path} is no shard of this job; it is now in {set_aside(path)}")
    written = job.done()
    there = _undamaged(job, [shard for shard in ours if shard in written], verify, say)
    todo = [shard for shard in ours if shard not in there]
    rows = sum(map(job.rows_of, ours))
    before = rows - sum(map(job.rows_of, todo))
    if retry_failed:
        todo += [shard for shard, errors in there.items() if errors and shard not in made_now]
    made, counts = 0, dict(there)

    def advance(one: ShardResult) -> None:
        nonlocal made
        made += one.rows
        # Of a shard that is done again, the rows without an error keep their maps.
        counts[one.shard] = one.errors
        if note is not None:
            note(one)
        if progress is not None:
            progress(min(before + made, rows), rows)

    if progress is not None:
        progress(before, rows)
    shards, makers, options = Shards(todo, tries, say, bool(there)), 1, replace(options, tries=tries)
    try:
        if not todo:
            stages = Stages()
        elif cluster is not None:
            stages, makers = run_on_cluster(job, cluster, shards, options, advance)
        elif len(devices) > 1:
            makers = len(devices)
            stages = run_on_devices(job, devices, shards, options, advance)
        else:
            stages = run_here(runtime, job, shards, options, advance, say, hang)
    finally:
        # Of processes and actors that died.
        job.remove_temporaries(rank)
        with contextlib.suppress(OSError):
            forget_attempts(job.out, job.done() & set(ours))
    done = [shard for shard in ours if shard not in shards.set_aside]
    failed = sum(counts[shard] for shard in done)
    maps = sum(map(job.rows_of, done)) - failed
    first = next((_first_error(job, shard) for shard in done if counts[shard]), None)
    seconds = time.perf_counter() - start
    return Report(rows, maps, failed, before, made, makers, seconds, stages, shards.set_aside, first)


def _undamaged(job: Job, there: list[int], verify: bool | None, say: Callable[[str], None]) -> dict[int, int]:
    """The shards that are as they were written, with how many rows have an error; others are set aside."""
    if verify is None:
        files = (path for shard in there for path in (job.part(shard), tensors_of(job.part(shard))))
        verify = sum(path.stat().st_size for path in files if path.exists()) <= _VERIFIED
    good = {}
    for shard in there:
        try:
            part = job.open_part(shard)
            part.check(verify)
            good[shard] = part.errors
        except DamagedError as error:
            folder = set_aside(job.part(shard))
            say(f"{error}; it is now in {folder}, and shard {shard} is made again")
    return good


def _first_error(job: Job, shard: int) -> tuple[str, str]:
    rows = job.open_part(shard).table(["key", "error"]).to_pylist()
    return next((row["key"], row["error"]) for row in rows if row["error"] is not None)
