"""A recipe that is loaded on a device, ready to make shards of a job."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from attnx.jobs.decoding import Decode, Decoders
from attnx.jobs.job import Job
from attnx.jobs.memory import default_workers
from attnx.jobs.options import RunOptions
from attnx.jobs.sources.reachable import Reachable
from attnx.jobs.tasks import Task
from attnx.jobs.worker import Worker
from attnx.models.loaded import Loaded
from attnx.models.pixels import Pixels
from attnx.remote import location

if TYPE_CHECKING:
    from attnx.jobs.recipe import Recipe

__all__ = ["Runtime"]

_ROWS_OF_A_PROCESS = 32


@dataclass(frozen=True)
class Runtime:
    """A recipe that is loaded on a device.

    Attributes:
        settings: everything that determines the maps, for JSON.
        row_bytes: bytes of one stored map.
        tensors, fill: see `Worker`.
    """

    recipe: Recipe
    device: torch.device
    loaded: Loaded
    pixels: Pixels
    task: Task
    settings: dict[str, Any]
    row_bytes: int
    tensors: bool
    fill: bool

    def with_max_pixels(self, max_pixels: int) -> Runtime:
        """A copy with another `max_pixels`."""
        return replace(
            self,
            recipe=replace(self.recipe, max_pixels=max_pixels),
            settings={**self.settings, "max_pixels": max_pixels},
        )

    @contextlib.contextmanager
    def worker(
        self,
        job: Job,
        options: RunOptions,
        say: Callable[[str], None] = print,
        hang: Callable[[str, int], None] | None = None,
    ) -> Iterator[Worker]:
        """The worker for a job. By default, a small job gets one decoder for every 32 rows.

        say, hang: see `Worker`.
        """
        workers = options.workers
        if workers is None:
            workers = min(default_workers(), -(-job.rows // _ROWS_OF_A_PROCESS))
        read = self.recipe.open_source().reader()
        decode = Decode(read, self.pixels, self.recipe.max_pixels)
        with (
            Decoders(decode, workers, options.timeout) as decoders,
            Worker(
                job, decoders, self.pixels, self.task, self.device, options.batch_size, self.tensors, self.fill, say,
                tries=options.tries, shard_timeout=options.shard_timeout, hang=hang,
                source=Reachable(location(self.recipe.source), read),
            ) as worker,
        ):  # fmt: skip
            yield worker
