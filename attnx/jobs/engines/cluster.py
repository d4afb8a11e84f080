"""Actors of a Ray cluster, each with a model of its own; the folder of the job is one that all its machines see."""

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
from attnx.jobs.recipe import RunOptions
from attnx.jobs.worker import ShardResult, Stages

__all__ = ["Cluster", "run_on_cluster"]

_AT_A_TIME = 2
_PATIENCE = 60.0  # seconds until it is said that nothing happens
_LEAST_VERSION = (2, 52)  # has token authentication
_LONGEST_FOLDER = 26  # characters: Ray's sockets stand 81 below it, and their paths have at most 107


@dataclass(frozen=True)
class Cluster:
    """address: of a running cluster; None: the one of RAY_ADDRESS, or a private one is started. actors: how many; one a
    GPU unless given, or without GPUs one a machine. gpus: of each; one where the cluster has any, unless given. cpus:
    of each, for its threads and for decoding; what a machine has, divided, unless given.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None
    gpus: float | None = None


class ShardActor:
    """An actor: loads the job's model where it stands, then makes shards."""

    def __init__(self, out: str, options: RunOptions) -> None:
        import contextlib

        import torch

        from attnx.jobs.recipe import recipe_of

        job = Job(Path(out))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        runtime = recipe_of(job.run["recipe"]).load(device)
        job.check_settings(runtime.settings)
        self._open, self._said = contextlib.ExitStack(), list[str]()
        self._worker = self._open.enter_context(runtime.worker(job, options, self._said.append, self._hangs))

    def _hangs(self, why: str, shard: int) -> None:
        os._exit(1)

    def ready(self) -> None:
        """Comes back once the model is there."""

    def run_shard(self, shard: int) -> tuple[ShardResult, dict[str, float], list[str]]:
        """See `Worker.run_shard`; comes back once it is written, with where the actor's time went so far, and what it
        has to say.
        """
        made = self._worker.run_shard(shard).result()
        said, self._said[:] = self._said[:], []
        return made, vars(self._worker.stages), said


def run_on_cluster(
    job: Job,
    cluster: Cluster,
    shards: Shards,
    options: RunOptions,
    advance: Callable[[ShardResult], None],
) -> tuple[Stages, int]:
    """Makes the shards with actors, and says where the time went, of all together, and how many they are.

    An actor that dies is replaced, and costs the shard that it was making. Actors for which there is no room yet are
    given shards once an autoscaler has made it.

    Raises:
        ImportError: no ray.
        RunError: see `Shards.failed`; ConnectionError: no cluster at the address.
        ValueError: a cluster is to be started, and this ray has no authentication.
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
    """Ray, with a cluster of its own on this machine, which nobody else can use.

    Ray's default joins whatever cluster a file in a shared folder names. Its servers take commands from everyone who
    reaches them, unless there is a token; they listen on loopback only where Ray believes that there is one machine.
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
            f"engine ray: expected ray 2.52 or newer, whose clusters can be private; got {ray.__version__}. Upgrade "
            "it, or give --address of a running cluster"
        )
    folders = (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir())
    above = next((each for each in folders if each and len(each) <= _LONGEST_FOLDER), "/tmp")
    os.makedirs(above, mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="attnx-", dir=above, ignore_cleanup_errors=True) as folder:
        # Ray opens the folder that it is given to everyone; it lies in one that is ours.
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
    """A handle, the shards that it was told with what will come of each, and where its time went."""

    handle: Any
    ready: Any
    theirs: deque[tuple[int, Any]] = field(default_factory=deque)
    stages: Stages = field(default_factory=Stages)

    @property
    def next(self) -> Any:
        """What is heard of it next."""
        return self.theirs[0][1] if self.theirs else self.ready


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
            heard = ray.wait(list(events), num_returns=1, timeout=_PATIENCE)[0]
            if not heard and (waiting := sum(actor.ready is not None for actor in actors)):
                shards.say(
                    f"{waiting} of {len(actors)} actors wait for room: each asks for {cpus} CPUs and {gpus:g} GPUs"
                )
            for event in heard:
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
                    told = [shard for shard, _ in actor.theirs]
                    shards.give_back(told[1:])
                    why = (why_of(cause).splitlines() or [""])[0]
                    died = not isinstance(error, ray.exceptions.RayTaskError)
                    shards.failed(told[0] if told else None, why, error, died, by_the_model(cause))
                    continue
                if event is actor.ready:
                    actor.ready = None
                    continue
                actor.theirs.popleft()
                made, seconds, said = answer
                actor.stages = Stages(**seconds)
                for text in said:
                    shards.say(text)
                shards.done()
                advance(ShardResult(*made))
        return sum((actor.stages for actor in actors), stages), len(actors)
    finally:
        for actor in actors:
            ray.kill(actor.handle)
            # The others wait for it.
            for shard, _ in list(actor.theirs)[:1]:
                job.attempt(shard, died=False).withdraw()


def _sizes(nodes: list[dict[str, Any]], cluster: Cluster) -> tuple[int, int, float]:
    """How many actors, and the CPUs and GPUs of each, such that the machines that there are have room for one."""
    there = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    having = [node for node in there if node.get("GPU", 0) >= 1]
    gpus = (1.0 if having else 0.0) if cluster.gpus is None else cluster.gpus
    hosts = having if gpus and having else there
    count = cluster.actors or (sum(int(node["GPU"] // gpus) for node in having) if gpus else len(hosts)) or 1
    each = [node["GPU"] // gpus if gpus and having else -(-count // len(hosts)) for node in hosts]
    room = [int(node["CPU"] // max(1, own)) for node, own in zip(hosts, each, strict=True)]
    return count, cluster.cpus or max(1, min(room, default=1)), gpus


def _hand_out(actors: list[_Actor], shards: Shards) -> None:
    """To the one that has fewest first, of those that are there."""
    there = [actor for actor in actors if actor.ready is None]
    while there:
        actor = min(there, key=lambda each: len(each.theirs))
        if len(actor.theirs) == _AT_A_TIME or (shard := shards.take()) is None:
            return
        actor.theirs.append((shard, actor.handle.run_shard.remote(shard)))
