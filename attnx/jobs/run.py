"""A run of a job: what is left of it, by an engine, and how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnx.jobs.engines.cluster import Cluster, run_on_cluster
from attnx.jobs.engines.here import run_here
from attnx.jobs.engines.local import run_on_devices
from attnx.jobs.engines.queue import Shards
from attnx.jobs.job import Job, Rank
from attnx.jobs.progress import Progress
from attnx.jobs.recipe import Running, Tools
from attnx.jobs.worker import Made, Stages

__all__ = ["Report", "run_job"]


@dataclass(frozen=True)
class Report:
    """How a run went. Of its part of the job: rows, those of them with a map, with an error, and that were done before.

    made: rows that were done in this run, by so many makers (processes, or actors) at a time; set_aside: shards that
    can't be made, and why.
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
    tools: Tools,
    job: Job,
    running: Running,
    *,
    devices: Sequence[str] = (),
    cluster: Cluster | None = None,
    rank: Rank | None = None,
    tries: int = 3,
    retry_failed: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Does what is left: the shards that are not there, or with `retry_failed` also rows with an error.

    Args:
        tools: what makes maps in this process.
        devices: more than one: a process for each.
        cluster: actors make the shards.
        rank: of several runs that share the job.
        tries: of a shard; then it is set aside.
        progress: called as progress(done, total) rows after every shard; done counts those of earlier runs.
        say: is told what is out of the ordinary.

    Raises:
        OSError: the disk is full; what was written is whole.
        RuntimeError: one shard after another fails, or what makes them does.
    """
    start = time.perf_counter()
    ours = range(job.shards) if rank is None else range(rank.rank, job.shards, rank.world)
    there = job.done()
    todo = [shard for shard in ours if shard not in there]
    rows = sum(map(job.rows_of, ours))
    before = rows - sum(map(job.rows_of, todo))
    if retry_failed:
        todo += [shard for shard in ours if shard in there and job.errors(shard)]
    made = errors = 0

    def advance(one: Made) -> None:
        nonlocal made, errors
        made, errors = made + one.rows, errors + one.errors
        if progress is not None:
            progress(min(before + made, rows), rows)

    if progress is not None:
        progress(before, rows)
    shards, makers = Shards(todo, tries, say), 1
    if not todo:
        stages = Stages()
    elif cluster is not None:
        stages, makers = run_on_cluster(job, cluster, shards, running, advance)
    elif len(devices) > 1:
        makers = len(devices)
        stages = run_on_devices(job, devices, shards, running, advance)
    else:
        stages = run_here(tools, job, shards, running, advance, say)
    # Of processes and actors that died.
    job.remove_temporaries(rank)
    done = [shard for shard in ours if shard not in shards.set_aside]
    failed = sum(map(job.errors, done))
    maps = sum(map(job.rows_of, done)) - failed
    return Report(rows, maps, failed, before, made, makers, time.perf_counter() - start, stages, shards.set_aside)
