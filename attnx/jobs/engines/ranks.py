"""Ranks: the share of this run in a job that several runs share, as set by torchrun, srun or a SLURM array."""

from __future__ import annotations

import os
from collections.abc import Mapping

from attnx.jobs.job import Rank

__all__ = ["device_of_rank", "rank_of"]


def device_of_rank(gpus: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """The GPU for this run's local rank, as set by torchrun or SLURM; None with fewer than two GPUs or no rank."""
    local = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", ""))
    return f"cuda:{int(local) % gpus}" if gpus > 1 and local.isdecimal() else None


# Environment variables of launchers: (rank, world size).
_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
_ARRAY = "SLURM_ARRAY_TASK_"


def rank_of(rank: int | None, world: int | None, environment: Mapping[str, str] = os.environ) -> Rank:
    """This run's rank: as given, else from the environment of torchrun, srun or a SLURM array.

    In a SLURM array of srun tasks, the world size is the product of both counts.

    Raises:
        ValueError: only one of `rank` and `world` is given, or neither is and the environment has none.
    """

    def number(name: str, default: str | None = None) -> int:
        text = environment.get(name, default)
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
    task = Rank(0, 1) if launcher is None else Rank(*map(number, launcher))
    if not array:
        return task
    # An array may start at any number and have a step.
    first, step, count = number(f"{_ARRAY}MIN", "0"), number(f"{_ARRAY}STEP", "1"), number(f"{_ARRAY}COUNT")
    last = number(f"{_ARRAY}MAX", str(first + (count - 1) * step))
    if (last - first) // step + 1 != count:
        raise ValueError(
            f"engine ranks: expected a SLURM array of all numbers from {first} to {last}; got {count} of them, "
            "so the rank of this task is unknown; set --rank and --world"
        )
    return Rank((number(f"{_ARRAY}ID") - first) // step * task.world + task.rank, count * task.world)
