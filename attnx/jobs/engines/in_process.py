"""Shards made in this process, one after another."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from attnx.jobs.engines.queue import Shards, by_the_model, is_fatal, why_of
from attnx.jobs.job import Job, Rank
from attnx.jobs.recipe import RunOptions, Runtime
from attnx.jobs.worker import ShardResult, Stages

__all__ = ["device_of_rank", "rank_of", "run_here"]


def run_here(
    runtime: Runtime,
    job: Job,
    shards: Shards,
    options: RunOptions,
    advance: Callable[[ShardResult], None],
    say: Callable[[str], None],
    hang: Callable[[str, int], None] | None = None,
) -> Stages:
    """Makes the shards, and says where the time went. An interrupt or a kill loses what is not written.

    hang: see `Worker`.

    Raises:
        OSError: the disk is full; what was written is whole.
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
                # What is being written may yet fail, and come back.
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


def device_of_rank(gpus: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """The GPU of a run that is one of several on a machine, as its launcher counts them; None if there is no choice."""
    local = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", ""))
    return f"cuda:{int(local) % gpus}" if gpus > 1 and local.isdecimal() else None


# Of a launcher: variables with the number of a run, and of how many it is one.
_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
_ARRAY = "SLURM_ARRAY_TASK_"


def rank_of(rank: int | None, world: int | None, environment: Mapping[str, str] = os.environ) -> Rank:
    """Which rank this run is: as given, or as torchrun, srun or a SLURM array say (tasks times those of each).

    Raises:
        ValueError: only one of the two is given, or nothing says it.
    """

    def number(name: str, otherwise: str | None = None) -> int:
        text = environment.get(name, otherwise)
        if text is None or not text.isdecimal():
            raise ValueError(f"engine ranks: expected a number in {name}; got {text!r}")
        return int(text)

    if (rank is None) != (world is None):
        raise ValueError(f"rank, world: expected both or none; got rank {rank}, world {world}")
    if rank is not None and world is not None:
        return Rank(rank, world)
    launcher = next((names for names in _LAUNCHERS if set(names) <= set(environment)), None)
    array = f"{_ARRAY}ID" in environment
    if launcher is None and not array:
        raise ValueError(
            "engine ranks: expected --rank and --world, or in the environment RANK and WORLD_SIZE (torchrun), "
            f"SLURM_PROCID and SLURM_NTASKS (srun), or {_ARRAY}ID and {_ARRAY}COUNT; got none of them"
        )
    of_task = Rank(0, 1) if launcher is None else Rank(*map(number, launcher))
    if not array:
        return of_task
    # An array may begin anywhere and go in steps.
    first, step, count = number(f"{_ARRAY}MIN", "0"), number(f"{_ARRAY}STEP", "1"), number(f"{_ARRAY}COUNT")
    last = number(f"{_ARRAY}MAX", str(first + (count - 1) * step))
    if (last - first) // step + 1 != count:
        raise ValueError(
            f"engine ranks: expected a SLURM array of all numbers from {first} to {last}; got {count} of them, "
            "of which this task can't know its place; give --rank and --world"
        )
    return Rank((number(f"{_ARRAY}ID") - first) // step * of_task.world + of_task.rank, count * of_task.world)
