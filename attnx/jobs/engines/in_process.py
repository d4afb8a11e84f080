"""The engine that makes shards in this process, one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from attnx.jobs.engines.queue import Shards, by_the_model, is_fatal, why_of
from attnx.jobs.job import Job
from attnx.jobs.options import RunOptions
from attnx.jobs.runtime import Runtime
from attnx.jobs.worker import ShardResult, Stages

__all__ = ["run_in_process"]


def run_in_process(
    runtime: Runtime,
    job: Job,
    shards: Shards,
    options: RunOptions,
    advance: Callable[[ShardResult], None],
    say: Callable[[str], None],
    hang: Callable[[str, int], None] | None = None,
) -> Stages:
    """Make the shards in this process, and return the time of each stage. An interrupt loses unfinished shards.

    say, hang: see `Worker`.

    Raises:
        OSError: the disk is full; finished shards are complete.
        RunError: see `Shards.failed`.
    """
    writing: deque[tuple[int, Future[ShardResult]]] = deque()

    def settle() -> None:
        shard, future = writing.popleft()
        try:
            made = future.result()
        except Exception as error:
            _failed(shards, shard, error)
        else:
            shards.done()
            advance(made)

    with runtime.worker(job, options, say, hang) as worker:
        following = shards.take()
        while not shards.finished:
            shard, following = following, shards.take()
            if shard is None:
                # A shard that is being written may still fail and return to the queue.
                if writing:
                    settle()
                continue
            try:
                writing.append((shard, worker.run_shard(shard, following)))
            except Exception as error:
                _failed(shards, shard, error)
            if len(writing) > 1:
                settle()
        return worker.stages


def _failed(shards: Shards, shard: int, error: Exception) -> None:
    if is_fatal(error):
        raise error
    shards.failed(shard, why_of(error), error, model=by_the_model(error))
