"""What the commands that run jobs share: their options, and the run from a recipe to the last line."""

import importlib.util
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, overload

import typer

from attnx.cli.options import PATH, device_of, devices_of, one_of
from attnx.limits import ACTORS
from attnx.messages import say
from attnx.supervisor import is_supervised, progressed, remember, remembered, restart

if TYPE_CHECKING:
    from attnx.jobs.engines.cluster import Cluster
    from attnx.jobs.job import Job, Rank
    from attnx.jobs.progress import Progress
    from attnx.jobs.recipe import Recipe, RunOptions, Runtime
    from attnx.jobs.run import Report
    from attnx.jobs.sources import Source
    from attnx.jobs.worker import ShardResult

ENGINES = ("local", "ranks", "ray")
_LOG_EVERY = 60.0  # seconds
_LONGEST = 1_000_000  # seconds

Kind = Annotated[str | None, typer.Option(help="What the source is: folder, table, tar or dataset.")]
Root = Annotated[Path | None, typer.Option(help="Folder of a table's paths; its own unless given.", **PATH)]
Split = Annotated[str | None, typer.Option(help="Of a data set that has several.")]
MapDtype = Annotated[str, typer.Option(help="float16, float32 or uint8, beside a scale of each map.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        help="A larger JPEG is decoded at a smaller scale, another larger picture is its row's error. Unless given, at "
        "most 178,956,970, fewer where memory is short for so many decoders; a job keeps the value of its first run.",
        min=1,
        show_default=False,
    ),
]
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
Tries = Annotated[
    int, typer.Option(help="How often a shard may fail before it is made in pieces, to find the bad image.", min=1)
]
ShardTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which a batch counts as hung; 20 times the longest one, at least 10, unless given.",
        show_default=False,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="First read every existing shard in full; otherwise only footers and sizes, if they exceed 1 GiB.",
    ),
]
LogEvery = Annotated[
    float | None,
    typer.Option(
        help="Seconds between lines of progress; 60 unless given, and a bar on a terminal.", show_default=False
    ),
]
AllowErrors = Annotated[
    str, typer.Option(help="Exit code 0 if at most so many rows have an error: a number, or a share such as 1%.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Do rows with an error again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell counts, size and time, and keep nothing.")]
Devices = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1; several with commas; all: every GPU; a GPU if there is one unless given."),
]


@dataclass(frozen=True)
class JobOptions:
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
    max_pixels: int | None
    shard_timeout: float | None
    verify: bool
    log_every: float | None
    allow_errors: str

    def check(self) -> "tuple[list[str], Rank | None, Cluster | None]":
        """The devices, and the rank or the cluster of those engines.

        Raises:
            ValueError: options of another engine; an unknown one.
        """
        import torch

        from attnx.jobs.engines.cluster import Cluster
        from attnx.jobs.engines.in_process import device_of_rank, rank_of

        one_of("engine", self.engine, ENGINES)
        if self.log_every is not None and not 0 < self.log_every <= _LONGEST:
            raise ValueError(f"log-every: expected seconds above 0, at most {_LONGEST:,}; got {self.log_every:g}")
        allowed_errors(self.allow_errors, 1)
        if self.actors is not None and self.actors > ACTORS:
            raise ValueError(f"actors: expected at most {ACTORS}; got {self.actors}")
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
    def run_options(self) -> "RunOptions":
        """What a worker is told."""
        from attnx.jobs.recipe import RunOptions

        return RunOptions(self.batch_size, self.workers, self.decode_timeout, self.tries, self.shard_timeout)

    @property
    def pixels(self) -> int:
        """max_pixels as asked for, or what memory allows."""
        from attnx.jobs.memory import default_max_pixels, default_workers

        workers = default_workers() if self.workers is None else self.workers
        return self.max_pixels or default_max_pixels(max(1, workers))


@overload
def absolute(path: Path) -> str: ...
@overload
def absolute(path: Path | None) -> str | None: ...
def absolute(path: Path | None) -> str | None:
    """As any process understands it, and from wherever it is given."""
    return None if path is None else str(path.resolve() if ".." in path.parts else path.absolute())


def allowed_errors(text: str, rows: int) -> int:
    """The number of rows that may have an error, from a number or a share of all rows.

    Raises:
        ValueError: it is neither.
    """
    number = text.removesuffix("%")
    share = text.endswith("%")
    if not re.fullmatch(r"\d{1,15}(\.\d{1,15})?" if share else r"\d{1,15}", number, re.ASCII) or (
        share and float(number) > 100
    ):
        raise ValueError(f"allow-errors: expected a number of rows, or a share such as 0.1%; got {text!r:.80}")
    # Of 100 rows 29 % are 29, and not 28, as floats have it.
    return int(Fraction(number) * rows / 100) if share else int(number)


def run_recipe(
    recipe: "Recipe",
    images: "Source",
    out: Path,
    options: JobOptions,
    what: str,
    finish: "Callable[[Runtime, Report], str] | None" = None,
    notice: str = "",
) -> None:
    """Runs a job, or tells what it would take, and says how it went; exit code 1 if rows have no map.

    Args:
        what: the rows are.
        finish: is called at the end, and has more to say.
        notice: is said before the run begins.
    """
    import torch

    from attnx.jobs.decoding import start_server
    from attnx.jobs.estimate import estimate
    from attnx.jobs.memory import decoder_bytes
    from attnx.jobs.progress import Log, progress_bar
    from attnx.jobs.run import run_job
    from attnx.jobs.sources.unplanned import unplanned

    (devices, rank, cluster), run_options = options.check(), options.run_options
    start_server()
    runtime = recipe.load(device_of(devices[0]))
    about = f"model {recipe.describe_model()}, source {_short(recipe.source)} ({recipe.kind})"
    begin = [line for line in (notice, about) if line]
    if options.dry_run:
        most = recipe.max_pixels
        for line in begin:
            say(line)
        say(f"pictures of at most {most:,} pixels, for which a decoder takes up to {decoder_bytes(most) / 1e6:,.0f} MB")
        typer.echo(estimate(runtime, run_options, options.shard_size, what, say))
        return
    if len(devices) > 1 or cluster is not None:
        # Others make the maps: nothing of it is to lie in a GPU's memory beside theirs.
        runtime.loaded.model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    bar = options.log_every is None and sys.stderr.isatty()
    log = Log(what, None if bar else options.log_every or _LOG_EVERY, say)

    def note(made: "ShardResult") -> None:
        log.errors += made.errors
        remember(made.shard)
        progressed()

    def hang(why: str, shard: int) -> None:
        say(f"{why}; it is started again")
        restart()

    try:
        with log, _opened(runtime, images, out, options, rank) as (runtime, job):
            # What was skipped is known to the run that has listed the source.
            for line in (*begin, *images.skipped.lines()):
                say(line)
            if job.run["batch_size"] not in (None, options.batch_size):
                told = f"batch-size: {job.run['batch_size']} in earlier runs, {options.batch_size} now"
                say(f"{told}: sums may be rounded otherwise, so maps may differ in their last bits")
            progressed()
            with progress_bar(job.rows, what) if bar else nullcontext(None) as drawn:
                report = run_job(
                    runtime, job, run_options, devices=devices, cluster=cluster, rank=rank, tries=options.tries,
                    retry_failed=options.retry_failed, made_now=remembered(), progress=_both(log.progress, drawn),
                    note=note, say=say, verify=True if options.verify else None, hang=hang if is_supervised() else None,
                )  # fmt: skip
            # At the end: a large source takes long to list.
            if not job.planned_now and (rank is None or rank.rank == 0):
                for line in unplanned(images, job):
                    say(line)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            told = f"ended by {signal.Signals(getattr(error, 'number', signal.SIGINT)).name}"
            say(f"interrupted, {told}; the same command goes on with the first shard that is not there")
        if log.total:
            say(f"stopped at {log.line()}; {about}")
        raise
    if report.made:
        typer.echo(report.stage_table())
    of_rank = "" if rank is None else f"rank {rank.rank} of {rank.world}: "
    before = f", {report.before} rows of an earlier run" if report.before else ""
    rate = f" ({report.made / report.seconds:.1f} {what}/s)" if report.made else ""
    more = "" if finish is None else finish(runtime, report)
    wrong = ""
    if report.errors:
        wrong = f", {report.errors} {what} could not be read: see their error column; --retry-failed tries them again"
    if report.first_error is not None:
        say(f"the first error is of {_short(report.first_error[0])}: {_short(report.first_error[1])}")
    if report.set_aside:
        shards = ", ".join(map(str, sorted(report.set_aside)))
        wrong += f", shards that could not be made: {shards}; run again to try them again"
    typer.echo(f"{of_rank}maps of {report.maps} {what} in {out}{before}{rate}{more}{wrong}; {about}")
    if report.set_aside or report.errors > allowed_errors(options.allow_errors, report.rows):
        raise typer.Exit(1)


@contextmanager
def _opened(
    runtime: "Runtime", images: "Source", out: Path, options: JobOptions, rank: "Rank | None"
) -> "Iterator[tuple[Runtime, Job]]":
    """The job, and the runtime with the job's max_pixels: the first run decided it, unless the option is given."""
    from attnx.jobs.job import open_job
    from attnx.jobs.runfile import read_run

    with ExitStack() as stack:
        for last in (False, True):
            if options.max_pixels is None:
                with suppress(OSError, ValueError, KeyError):
                    runtime = runtime.with_max_pixels(int(read_run(out)["settings"]["max_pixels"]))
            recipe = runtime.recipe
            try:
                opened = open_job(
                    out, images, recipe.describe_source(), runtime.settings, recipe.to_json(), options.shard_size,
                    runtime.row_bytes, rank, options.batch_size,
                )  # fmt: skip
                job = stack.enter_context(opened)
                break
            except ValueError:
                # Another rank may just have planned, on a machine with more memory.
                if last or rank is None:
                    raise
        yield runtime, job


def _both(first: "Progress", second: "Progress | None") -> "Progress":
    def progress(done: int, total: int) -> None:
        first(done, total)
        if second is not None:
            second(done, total)

    return progress


def _short(text: str) -> str:
    """A name for a line: what could move a terminal's cursor is escaped, and the middle of a long one is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= 160 else f"{text[:80]}…{text[-79:]}"
