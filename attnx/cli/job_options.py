"""Options of the commands that run jobs."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

import typer

from attnx.cli.options import SOURCE, BatchSize, devices_of, one_of
from attnx.limits import ACTORS
from attnx.remote import is_remote

if TYPE_CHECKING:
    from attnx.jobs.engines.cluster import Cluster
    from attnx.jobs.job import Rank
    from attnx.jobs.options import RunOptions

ENGINES = ("local", "ranks", "ray")
_LONGEST = 1_000_000  # seconds

Kind = Annotated[str | None, typer.Option(help="Kind of the source: folder, table, tar or dataset.")]
Root = Annotated[
    Path | None, typer.Option(help="Folder for relative paths in a table; default: the table's.", **SOURCE)
]
Split = Annotated[str | None, typer.Option(help="Split of a data set with several splits.")]
MapDtype = Annotated[str, typer.Option(help="Dtype of stored maps: float16, float32 or uint8, with a scale per map.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        help="A larger JPEG is decoded at a smaller scale; another larger picture is an error. The default depends on "
        "the memory and the number of decoders, at most 178,956,970. A job keeps the value of its first run.",
        min=1,
        show_default=False,
    ),
]
ShardSize = Annotated[
    int | None, typer.Option(help="Rows per shard; default: 1024, or fewer for large maps.", show_default=False)
]
Workers = Annotated[
    int | None, typer.Option(help="Decoder processes; default: one per core; 0: decode in this process.", min=0)
]
DecodeTimeout = Annotated[float, typer.Option(help="Seconds per image for decoding; beyond it, the row gets an error.")]
Engine = Annotated[
    str,
    typer.Option(
        help="[bold]local[/bold]: a process per device, as in --device cuda:0,cuda:1; [bold]ranks[/bold]: this run is "
        "one of several that share OUT (torchrun, srun, SLURM arrays, --rank, --world); [bold]ray[/bold]: Ray actors."
    ),
]
RankOf = Annotated[int | None, typer.Option("--rank", help="Ranks: rank of this run, from 0.")]
World = Annotated[int | None, typer.Option(help="Ranks: world size.")]
Address = Annotated[str | None, typer.Option(help="Ray: address of the cluster; default: a local one.")]
Actors = Annotated[int | None, typer.Option(help="Ray: number of actors; default: one per GPU, or per machine.", min=1)]
ActorCpus = Annotated[int | None, typer.Option(help="Ray: CPUs per actor; default: a machine's, divided.", min=1)]
ActorGpus = Annotated[
    float | None, typer.Option(help="Ray: GPUs per actor; default: 1 if the cluster has GPUs now, else 0.", min=0)
]
Tries = Annotated[
    int, typer.Option(help="Failures of a shard before it is made in pieces to find the bad image.", min=1)
]
ShardTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which a batch counts as hung; default: 20 times the longest batch, at least 10.",
        show_default=False,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Read all existing shards in full first; by default only footers and sizes if they exceed 1 GiB.",
    ),
]
LogEvery = Annotated[
    float | None,
    typer.Option(help="Seconds between lines of progress; default: 60, or a bar on a terminal.", show_default=False),
]
AllowErrors = Annotated[
    str, typer.Option(help="Exit with 0 if at most this many rows have an error: a number, or a share such as 1%.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Retry rows with an error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print counts and the estimated size and time; write nothing.")]
Devices = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1; several with commas; all: every GPU; default: a GPU if there is one."),
]


@dataclass(frozen=True)
class JobOptions:
    """The options of a run, as given on the command line; the defaults and helps of all commands that run jobs."""

    batch_size: BatchSize = 16
    workers: Workers = None
    decode_timeout: DecodeTimeout = 120.0
    shard_size: ShardSize = None
    max_pixels: MaxPixels = None
    device: Devices = None
    engine: Engine = "local"
    rank: RankOf = None
    world: World = None
    address: Address = None
    actors: Actors = None
    actor_cpus: ActorCpus = None
    actor_gpus: ActorGpus = None
    tries: Tries = 3
    shard_timeout: ShardTimeout = None
    retry_failed: RetryFailed = False
    verify: Verify = False
    allow_errors: AllowErrors = "0"
    log_every: LogEvery = None
    dry_run: DryRun = False

    def check(self) -> "tuple[list[str], Rank | None, Cluster | None]":
        """The devices, the rank of engine ranks, and the cluster of engine ray.

        Raises:
            ValueError: an option does not apply to the engine, or a value is invalid.
        """
        import torch

        from attnx.jobs.engines.cluster import Cluster
        from attnx.jobs.engines.ranks import device_of_rank, rank_of

        one_of("engine", self.engine, ENGINES)
        if self.log_every is not None and not 0 < self.log_every <= _LONGEST:
            raise ValueError(f"log-every: expected seconds above 0, at most {_LONGEST:,}; got {self.log_every:g}")
        allowed_errors(self.allow_errors, 1)
        if self.actors is not None and self.actors > ACTORS:
            raise ValueError(f"actors: expected at most {ACTORS}; got {self.actors}")
        if self.engine != "ranks" and (self.rank, self.world) != (None, None):
            raise ValueError(f"rank, world: only for --engine ranks; got --engine {self.engine}")
        of_ray = (self.address, self.actors, self.actor_cpus, self.actor_gpus)
        if self.engine != "ray" and of_ray != (None,) * 4:
            raise ValueError(
                f"address, actors, actor-cpus, actor-gpus: only for --engine ray; got --engine {self.engine}"
            )
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise ValueError("engine ray: expected ray, which is not installed; pip install 'attnx[ray]'")
        device = self.device
        if self.engine == "ranks" and device is None:
            device = device_of_rank(torch.cuda.device_count())
        devices = devices_of(device)
        if len(devices) > 1 and self.engine != "local":
            raise ValueError(
                f"device: several devices only for --engine local; got {self.device} with --engine {self.engine}"
            )
        rank = rank_of(self.rank, self.world) if self.engine == "ranks" else None
        return devices, rank, Cluster(*of_ray) if self.engine == "ray" else None

    @property
    def run_options(self) -> "RunOptions":
        """Options that are sent to each worker."""
        from attnx.jobs.options import RunOptions

        return RunOptions(self.batch_size, self.workers, self.decode_timeout, self.tries, self.shard_timeout)

    @property
    def pixels(self) -> int:
        """The given max_pixels, else the default for this machine's memory."""
        from attnx.jobs.memory import default_max_pixels, default_workers

        workers = default_workers() if self.workers is None else self.workers
        return self.max_pixels or default_max_pixels(max(1, workers))


def runs_jobs(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `JobOptions` after its own; it receives them as its argument `options`."""
    own = [each for each in signature(command).parameters.values() if each.name != "options"]
    shared = []
    for each in fields(JobOptions):
        kind: Any = each.type
        kind.__metadata__[0].rich_help_panel = "Options of jobs"
        shared.append(Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=kind))

    @wraps(command)
    def run(**arguments: Any) -> None:
        options = JobOptions(**{each.name: arguments.pop(each.name) for each in shared})
        command(**arguments, options=options)

    # Typer reads these.
    made: Any = run
    made.__signature__ = Signature([*own, *shared])
    made.__annotations__ = {each.name: each.annotation for each in (*own, *shared)}
    return run


@overload
def absolute(path: Path) -> str: ...
@overload
def absolute(path: Path | None) -> str | None: ...
def absolute(path: Path | None) -> str | None:
    """The absolute path or the URL as text, which is valid in any process; None for None."""
    if path is None or is_remote(path):
        return None if path is None else str(path)
    return str(path.resolve() if ".." in path.parts else path.absolute())


def allowed_errors(text: str, rows: int) -> int:
    """The number of rows that may have an error, from a number or a share of all rows.

    Raises:
        ValueError: the text is neither a number nor a share.
    """
    number = text.removesuffix("%")
    share = text.endswith("%")
    if not re.fullmatch(r"\d{1,15}(\.\d{1,15})?" if share else r"\d{1,15}", number, re.ASCII) or (
        share and float(number) > 100
    ):
        raise ValueError(f"allow-errors: expected a number of rows, or a share such as 0.1%; got {text!r:.80}")
    # Exact fractions: with floats, 29 % of 100 rows would be 28.
    return int(Fraction(number) * rows / 100) if share else int(number)
