"""Runs a recipe from the command line: loads the model, makes the shards, and prints the result."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from attnx.cli.job_options import JobOptions, allowed_errors
from attnx.cli.options import device_of
from attnx.messages import printable, say
from attnx.supervisor import is_supervised, progressed, remember, remembered, restart

if TYPE_CHECKING:
    from attnx.jobs.engines.cluster import Cluster
    from attnx.jobs.job import Job, Rank
    from attnx.jobs.options import RunOptions
    from attnx.jobs.progress import Log, Progress
    from attnx.jobs.recipe import Recipe
    from attnx.jobs.run import Report
    from attnx.jobs.runtime import Runtime
    from attnx.jobs.sources import Source
    from attnx.jobs.worker import ShardResult

_LOG_EVERY = 60.0  # seconds


def run_recipe(
    recipe: "Recipe",
    images: "Source",
    out: Path,
    options: JobOptions,
    unit: str,
    finish: "Callable[[Runtime, Report], str] | None" = None,
    notice: str = "",
    made: str = "maps",
) -> None:
    """Run or estimate a job, and print the result. Exits with code 1 if too many rows have an error.

    Args:
        unit: name of the rows, "images" or "pairs".
        finish: called at the end; its text is appended to the result.
        notice: message before the run.
        made: name of what is made of each image.
    """
    import torch

    from attnx.jobs.decoding import start_server
    from attnx.jobs.progress import Log
    from attnx.jobs.sources.unplanned import unplanned

    # Invalid options raise before the folder is created.
    (devices, rank, cluster), run_options = options.check(), options.run_options
    start_server()
    runtime = recipe.load(device_of(devices[0]))
    about = f"model {recipe.describe_model()}, source {_name(recipe.source)} ({recipe.kind})"
    begin = [line for line in (notice, about) if line]
    if options.dry_run:
        for line in begin:
            say(line)
        _print_estimate(runtime, run_options, options.shard_size, unit)
        return
    if len(devices) > 1 or cluster is not None:
        # Other processes make the maps, so this one must not use the GPU's memory.
        runtime.loaded.model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    bar = options.log_every is None and sys.stderr.isatty()
    log = Log(unit, None if bar else options.log_every or _LOG_EVERY, say)

    try:
        with log, _opened(runtime, images, out, options, rank) as (runtime, job):
            # Skipped files are only known if this run has listed the source.
            for line in (*begin, *images.skipped.lines()):
                say(line)
            if job.run["batch_size"] not in (None, options.batch_size):
                message = f"batch-size: {job.run['batch_size']} in earlier runs, {options.batch_size} now"
                say(f"{message}: sums may be rounded differently, so maps may differ in their last bits")
            progressed()
            report = _make_shards(
                runtime, job, options, run_options, devices, rank, cluster, log, unit if bar else None
            )
            # At the end, because listing a large source takes long.
            if not job.planned_now and (rank is None or rank.rank == 0):
                for line in unplanned(images, job):
                    say(line)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            message = f"ended by {signal.Signals(getattr(error, 'number', signal.SIGINT)).name}"
            say(f"interrupted, {message}; run the same command again to continue with the first missing shard")
        if log.total:
            say(f"stopped at {log.line()}; {about}")
        raise
    if report.made:
        typer.echo(report.stage_table())
    more = "" if finish is None else finish(runtime, report)
    _print_report(report, out, f"{made} of {report.maps} {unit}", unit, rank, more, about)
    if report.set_aside or report.errors > allowed_errors(options.allow_errors, report.rows):
        raise typer.Exit(1)


def _print_estimate(runtime: "Runtime", options: "RunOptions", shard_size: int | None, unit: str) -> None:
    """Print the limits of the decoders, and the job's estimated size and time."""
    from attnx.jobs.estimate import estimate
    from attnx.jobs.memory import decoder_bytes

    most = runtime.recipe.max_pixels
    say(f"pictures of at most {most:,} pixels, for which a decoder takes up to {decoder_bytes(most) / 1e6:,.0f} MB")
    typer.echo(estimate(runtime, options, shard_size, unit, say))


def _make_shards(
    runtime: "Runtime",
    job: "Job",
    options: JobOptions,
    run_options: "RunOptions",
    devices: list[str],
    rank: "Rank | None",
    cluster: "Cluster | None",
    log: "Log",
    unit: str | None,
) -> "Report":
    """Make the missing shards. With `unit`, a progress bar counts these units."""
    from attnx.jobs.progress import progress_bar
    from attnx.jobs.run import run_job

    def note(made: "ShardResult") -> None:
        log.errors += made.errors
        remember(made.shard)
        progressed()

    def hang(why: str, shard: int) -> None:
        say(f"{why}; it is restarted")
        restart()

    with nullcontext(None) if unit is None else progress_bar(job.rows, unit) as drawn:
        return run_job(
            runtime, job, run_options, devices=devices, cluster=cluster, rank=rank, tries=options.tries,
            retry_failed=options.retry_failed, made_now=remembered(), progress=_both(log.progress, drawn), note=note,
            say=say, verify=True if options.verify else None, hang=hang if is_supervised() else None,
        )  # fmt: skip


def _print_report(
    report: "Report", out: Path, made: str, unit: str, rank: "Rank | None", more: str, about: str
) -> None:
    """Print the counts of a run, and messages about its errors; `made`: "maps of 12 images"."""
    prefix = "" if rank is None else f"rank {rank.rank} of {rank.world}: "
    before = f", {report.before} rows from earlier runs" if report.before else ""
    rate = f" ({report.made / report.seconds:.1f} {unit}/s)" if report.made else ""
    wrong = ""
    if report.errors:
        wrong = f", {report.errors} {unit} have an error: see the error column; --retry-failed tries them again"
    if report.first_error is not None:
        say(f"the first error is in {_name(report.first_error[0])}: {_name(report.first_error[1])}")
    if report.set_aside:
        numbers = ", ".join(map(str, sorted(report.set_aside)))
        wrong += f", {len(report.set_aside)} shards could not be made (numbers {numbers}); run again to try them again"
    typer.echo(f"{prefix}{made} in {out}{before}{rate}{more}{wrong}; {about}")


@contextmanager
def _opened(
    runtime: "Runtime", images: "Source", out: Path, options: JobOptions, rank: "Rank | None"
) -> "Iterator[tuple[Runtime, Job]]":
    """The job, and the runtime with the job's max_pixels, which the first run has set, unless the option is given."""
    from attnx.jobs.plan import open_job
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
                # Another rank may have planned meanwhile, on a machine with more memory.
                if last or rank is None:
                    raise
        yield runtime, job


def _both(first: "Progress", second: "Progress | None") -> "Progress":
    def progress(done: int, total: int) -> None:
        first(done, total)
        if second is not None:
            second(done, total)

    return progress


def _name(text: str) -> str:
    """A name for a message, with its middle cut out if it is long."""
    return printable(text, 160, middle=True)
