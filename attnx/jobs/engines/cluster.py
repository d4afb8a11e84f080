"""The engine that makes shards with actors of a Ray cluster. All machines must have access to the job's folder."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attnx.jobs.engines.queue import Shards, by_the_model, is_fatal, why_of
from attnx.jobs.job import Job
from attnx.jobs.options import RunOptions
from attnx.jobs.worker import ShardResult, Stages

__all__ = ["Cluster", "run_on_cluster"]

_AT_A_TIME = 2
_PATIENCE = 60.0  # seconds without an event before a message
_LEAST_VERSION = (2, 52)  # the first version with token authentication
_LONGEST_FOLDER = 26  # characters; Ray appends 81 for its sockets, whose paths have at most 107


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and its actors.

    Args:
        address: address of a running cluster; by default RAY_ADDRESS, else a private cluster is started.
        actors: number of actors; by default one per GPU, or one per machine without GPUs.
        cpus: CPUs per actor, for its threads and decoders; by default a machine's CPUs divided by its actors.
        gpus: GPUs per actor; by default 1 if the cluster has GPUs, else 0.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None
    gpus: float | None = None


class ShardActor:
    """An actor that loads the job's model and then makes shards."""

    def __init__(self, out: str, options: RunOptions) -> None:
        import contextlib

        import torch

        from attnx.jobs.recipe import recipe_of

        job = Job(Path(out))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        runtime = recipe_of(job.run["recipe"]).load(device)
        job.check_settings(runtime.settings)
        self._open, self._messages = contextlib.ExitStack(), list[str]()
        self._worker = self._open.enter_context(runtime.worker(job, options, self._messages.append, self._hangs))

    def _hangs(self, why: str, shard: int) -> None:
        os._exit(1)

    def ready(self) -> None:
        """Return when the model is loaded."""

    def run_shard(self, shard: int) -> tuple[ShardResult, dict[str, float], list[str]]:
        """The result of a shard after it is written, the actor's time per stage so far, and its new messages."""
        made = self._worker.run_shard(shard).result()
        messages, self._messages[:] = self._messages[:], []
        return made, vars(self._worker.stages), messages


def run_on_cluster(
    job: Job,
    cluster: Cluster,
    shards: Shards,
    options: RunOptions,
    advance: Callable[[ShardResult], None],
) -> tuple[Stages, int]:
    """Make the shards with actors; return the total time per stage and the number of actors.

    An actor that dies is replaced, and its shard is made again. Actors that wait for resources get shards when an
    autoscaler has added machines.

    Raises:
        ImportError: ray is not installed.
        RunError: see `Shards.failed`.
        ConnectionError: there is no cluster at the address.
        ValueError: a private cluster is needed, but this version of ray has no authentication.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    with _connected(address) if address else _private_cluster() as ray:
        return _run(ray, job, cluster, shards, options, advance)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to a running cluster."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _private_cluster() -> Iterator[Any]:
    """Ray, with a private cluster on this machine.

    By default, Ray joins the cluster that a file in a shared folder names. Without a token, its servers accept commands
    from anyone on the network. They listen on loopback only if multi-machine clusters are disabled.
    """
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    version = tuple(int(number) for number in re.findall(r"\d+", ray.__version__)[:2])
    if version < _LEAST_VERSION:
        raise ValueError(
            f"engine ray: expected ray 2.52 or newer, which supports private clusters; got {ray.__version__}. Upgrade "
            "it, or set --address to a running cluster"
        )
    folders = (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir())
    above = next((each for each in folders if each and len(each) <= _LONGEST_FOLDER), "/tmp")
    os.makedirs(above, mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="attnx-", dir=above, ignore_cleanup_errors=True) as folder:
        # Ray makes its folder accessible to all users, so it is inside a private folder.
        ray.init(
            address="local", include_dashboard=False, _temp_dir=f"{folder}/r", _node_ip_address="127.0.0.1",
            log_to_driver=False, logging_level=logging.WARNING,
        )  # fmt: skip
        try:
            yield ray
        finally:
            ray.shutdown()


@dataclass(eq=False)
class _Actor:
    """An actor.

    ready: the reference of `ShardActor.ready`; None when it has returned. queue: its shards with their references.
    """

    handle: Any
    ready: Any
    queue: deque[tuple[int, Any]] = field(default_factory=deque)
    stages: Stages = field(default_factory=Stages)

    @property
    def next(self) -> Any:
        """The reference that completes next."""
        return self.queue[0][1] if self.queue else self.ready


def _run(
    ray: Any, job: Job, cluster: Cluster, shards: Shards, options: RunOptions, advance: Callable[[ShardResult], None]
) -> tuple[Stages, int]:
    count, cpus, gpus = _sizes(ray.nodes(), cluster)
    options = replace(options, workers=cpus if options.workers is None else options.workers)
    kind = ray.remote(num_cpus=cpus, num_gpus=gpus)(ShardActor)

    def start() -> _Actor:
        handle = kind.remote(str(job.out.absolute()), options)
        return _Actor(handle, handle.ready.remote())

    stages = Stages()
    actors = [start() for _ in range(min(count, job.shards))]
    try:
        while not shards.finished:
            _hand_out(actors, shards)
            events = {actor.next: actor for actor in actors if actor.next is not None}
            completed = ray.wait(list(events), num_returns=1, timeout=_PATIENCE)[0]
            if not completed and (waiting := sum(actor.ready is not None for actor in actors)):
                shards.say(
                    f"{waiting} of {len(actors)} actors wait for resources: each needs {cpus} CPUs and {gpus:g} GPUs"
                )
            for event in completed:
                actor = events[event]
                try:
                    answer = ray.get(event)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None) or error
                    if is_fatal(cause):
                        raise cause from error
                    ray.kill(actor.handle)
                    stages += actor.stages
                    actors[actors.index(actor)] = start()
                    queued = [shard for shard, _ in actor.queue]
                    shards.give_back(queued[1:])
                    why = (why_of(cause).splitlines() or [""])[0]
                    died = not isinstance(error, ray.exceptions.RayTaskError)
                    shards.failed(queued[0] if queued else None, why, error, died, by_the_model(cause))
                    continue
                if event is actor.ready:
                    actor.ready = None
                    continue
                actor.queue.popleft()
                made, seconds, messages = answer
                actor.stages = Stages(**seconds)
                for message in messages:
                    shards.say(message)
                shards.done()
                advance(ShardResult(*made))
        return sum((actor.stages for actor in actors), stages), len(actors)
    finally:
        for actor in actors:
            ray.kill(actor.handle)
            # Only the first shard in the queue was started.
            for shard, _ in list(actor.queue)[:1]:
                job.attempt(shard, died=False).withdraw()


def _sizes(nodes: list[dict[str, Any]], cluster: Cluster) -> tuple[int, int, float]:
    """The number of actors, and the CPUs and GPUs of each, so that every machine has room for its actors."""
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    with_gpus = [node for node in alive if node.get("GPU", 0) >= 1]
    gpus = (1.0 if with_gpus else 0.0) if cluster.gpus is None else cluster.gpus
    hosts = with_gpus if gpus and with_gpus else alive
    count = cluster.actors or (sum(int(node["GPU"] // gpus) for node in with_gpus) if gpus else len(hosts)) or 1
    actors_of = [node["GPU"] // gpus if gpus and with_gpus else -(-count // len(hosts)) for node in hosts]
    cpus_of = [int(node["CPU"] // max(1, actors)) for node, actors in zip(hosts, actors_of, strict=True)]
    return count, cluster.cpus or max(1, min(cpus_of, default=1)), gpus


def _hand_out(actors: list[_Actor], shards: Shards) -> None:
    """Give shards to the actors that are ready, always to the one with the fewest."""
    ready = [actor for actor in actors if actor.ready is None]
    while ready:
        actor = min(ready, key=lambda each: len(each.queue))
        if len(actor.queue) == _AT_A_TIME or (shard := shards.take()) is None:
            return
        actor.queue.append((shard, actor.handle.run_shard.remote(shard)))
