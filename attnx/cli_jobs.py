"""What the commands that run jobs share: their options, and the run from a recipe to the last line."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, overload

import typer

from attnx.cli_options import device_of, devices_of, one_of

if TYPE_CHECKING:
    from attnx.jobs.engines.cluster import Cluster
    from attnx.jobs.job import Rank
    from attnx.jobs.recipe import Recipe, Running, Tools
    from attnx.jobs.run import Report
    from attnx.jobs.sources import Source

ENGINES = ("local", "ranks", "ray")
MAX_PIXELS = 178_956_970  # Pillow's own

Kind = Annotated[str | None, typer.Option(help="What the source is: folder, table, tar or dataset.")]
Root = Annotated[Path | None, typer.Option(help="Folder of a table's paths; its own unless given.")]
Split = Annotated[str | None, typer.Option(help="Of a data set that has several.")]
MapDtype = Annotated[str, typer.Option(help="float16, float32 or uint8, beside a scale of each map.")]
MaxPixels = Annotated[int, typer.Option(help="A larger picture is its row's error.", min=1)]
ShardSize = Annotated[
    int | None, typer.Option(help="Rows of a shard; 1024 unless given, fewer of large maps.", show_default=False)
]
Workers = Annotated[
    int | None, typer.Option(help="Processes that decode; one a core unless given; 0: this one does.", min=0)
]
DecodeTimeout = Annotated[float, typer.Option(help="Seconds for an image; then that is its row's error.")]
Engine = Annotated[
    str,
    typer.Option(
        help="[bold]local[/bold]: a process for each of --device cuda:0,cuda:1; [bold]ranks[/bold]: this run is "
        "one of several that share OUT (torchrun, srun, SLURM arrays, --rank, --world); [bold]ray[/bold]: actors."
    ),
]
RankOf = Annotated[int | None, typer.Option("--rank", help="Ranks: which one this is, from 0.")]
World = Annotated[int | None, typer.Option(help="Ranks: of how many.")]
Address = Annotated[str | None, typer.Option(help="Ray: of the cluster; a local one unless given.")]
Actors = Annotated[int | None, typer.Option(help="Ray: how many; one a GPU, or a machine.", min=1)]
ActorCpus = Annotated[int | None, typer.Option(help="Ray: of each; what a machine has, divided.", min=1)]
ActorGpus = Annotated[
    float | None, typer.Option(help="Ray: of each; 1 if the cluster has any; give it where none is up yet.", min=0)
]
Tries = Annotated[int, typer.Option(help="Of a shard whose process dies; then it is set aside.", min=1)]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Do rows with an error again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell counts, size and time, and keep nothing.")]
Devices = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1; several with commas; all: every GPU; a GPU if there is one unless given."),
]


@dataclass(frozen=True)
class Asked:
    """How a job is to run, as the options say."""

    batch_size: int
    workers: int | None
    decode_timeout: float
    shard_size: int | None
    device: str | None
    engine: str
    rank: int | None
    world: int | None
    address: str | None
    actors: int | None
    actor_cpus: int | None
    actor_gpus: float | None
    tries: int
    retry_failed: bool
    dry_run: bool

    def check(self) -> "tuple[list[str], Rank | None, Cluster | None]":
        """The devices, and the rank or the cluster of those engines.

        Raises:
            ValueError: options of another engine; an unknown one.
        """
        import torch

        from attnx.jobs.engines.cluster import Cluster
        from attnx.jobs.engines.here import device_of_rank, rank_of

        one_of("engine", self.engine, ENGINES)
        if self.engine != "ranks" and (self.rank, self.world) != (None, None):
            raise ValueError(f"rank, world: they are for --engine ranks; got --engine {self.engine}")
        of_ray = (self.address, self.actors, self.actor_cpus, self.actor_gpus)
        if self.engine != "ray" and of_ray != (None,) * 4:
            raise ValueError(
                f"address, actors, actor-cpus, actor-gpus: they are for --engine ray; got --engine {self.engine}"
            )
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise ValueError("engine ray: expected ray, which is not installed; pip install 'attnx[ray]'")
        device = self.device
        if self.engine == "ranks" and device is None:
            device = device_of_rank(torch.cuda.device_count())
        devices = devices_of(device)
        if len(devices) > 1 and self.engine != "local":
            raise ValueError(f"device: several are for --engine local; got {self.device} with --engine {self.engine}")
        rank = rank_of(self.rank, self.world) if self.engine == "ranks" else None
        return devices, rank, Cluster(*of_ray) if self.engine == "ray" else None

    @property
    def running(self) -> "Running":
        """What a worker is told."""
        from attnx.jobs.recipe import Running

        return Running(self.batch_size, self.workers, self.decode_timeout)


@overload
def absolute(path: Path) -> str: ...
@overload
def absolute(path: Path | None) -> str | None: ...
def absolute(path: Path | None) -> str | None:
    """As any process understands it, and from wherever it is given."""
    return None if path is None else str(path.resolve() if ".." in path.parts else path.absolute())


def _say(text: str) -> None:
    typer.echo(f"attnx: {text}", err=True)


def run_recipe(
    recipe: "Recipe",
    images: "Source",
    out: Path,
    asked: Asked,
    what: str,
    finish: "Callable[[Tools, Report], str] | None" = None,
) -> None:
    """Runs a job, or tells what it would take, and says how it went; exit code 1 if rows have no map.

    Args:
        what: the rows are.
        finish: is called at the end, and has more to say.
    """
    import torch

    from attnx.jobs.decoding import start_server
    from attnx.jobs.estimate import estimate
    from attnx.jobs.job import open_job
    from attnx.jobs.progress import progress_bar
    from attnx.jobs.run import run_job

    (devices, rank, cluster), running = asked.check(), asked.running
    start_server()
    tools = recipe.load(device_of(devices[0]))
    if asked.dry_run:
        typer.echo(estimate(tools, running, asked.shard_size, what, _say))
        return
    if len(devices) > 1 or cluster is not None:
        # Others make the maps: nothing of it is to lie in a GPU's memory beside theirs.
        tools.loaded.model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    plan = (recipe.describe_source(), tools.settings, recipe.to_json(), asked.shard_size, tools.row_bytes, rank)
    try:
        with open_job(out, images, *plan) as job, progress_bar(job.rows, what) as progress:
            # Nothing, unless this run has listed the source.
            for line in images.skipped.lines():
                _say(line)
            report = run_job(
                tools, job, running, devices=devices, cluster=cluster, rank=rank, tries=asked.tries,
                retry_failed=asked.retry_failed, progress=progress,
                say=_say,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("attnx: interrupted; the same command goes on with the first shard that is not there", err=True)
        raise
    if report.made:
        typer.echo(report.stage_table())
    of_rank = "" if rank is None else f"rank {rank.rank} of {rank.world}: "
    before = f", {report.before} rows of an earlier run" if report.before else ""
    rate = f" ({report.made / report.seconds:.1f} {what}/s)" if report.made else ""
    more = "" if finish is None else finish(tools, report)
    wrong = f", {report.errors} {what} could not be read: see their error column" if report.errors else ""
    if report.set_aside:
        shards = ", ".join(map(str, sorted(report.set_aside)))
        wrong += f", shards that could not be made: {shards}; run again to try them again"
    typer.echo(f"{of_rank}maps of {report.maps} {what} in {out}{before}{rate}{more}{wrong}")
    if report.errors or report.set_aside:
        raise typer.Exit(1)
