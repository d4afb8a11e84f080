"""`attnx probe`: how far and how widely each head attends, over a data set; `attnx compare`: several such jobs."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnx.cli.job_options import (
    JobOptions,
    Kind,
    Root,
    Split,
    absolute,
    runs_jobs,
)
from attnx.cli.options import (
    MODEL,
    PATH,
    PICTURE_PIXELS,
    SOURCE,
    Checkpoint,
    Dtype,
    FormerLayers,
    ImageSize,
    LayersOption,
    Out,
    Pretrained,
    Seed,
    absolute_model,
    autocast_of,
    layers_of,
    named_model,
    pixels_of,
    report_errors,
)
from attnx.cli.run_job import run_recipe

if TYPE_CHECKING:
    from attnx.jobs.run import Report
    from attnx.jobs.runtime import Runtime


_FIRST = 1000  # images, of which one must have a target


@report_errors
@runs_jobs
def probe(
    source: Annotated[Path, typer.Argument(help="Images, as for attnx extract.", **SOURCE)],
    model: Annotated[str | None, MODEL] = None,
    out: Out = Path("attnx-probe"),
    stat: Annotated[
        list[str] | None,
        typer.Option(
            help="[bold]entropy[/bold] (nats), [bold]distance[/bold] (pixels), [bold]max[/bold] (largest weight), "
            "[bold]mass[/bold] (weight on prefix tokens); repeat for several; default: all that the model has."
        ),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns key and target (a class of the model) of each image: adds the importance of "
            "each head, from the gradient of the cross entropy.",
            **PATH,
        ),
    ] = None,
    patch_size: Annotated[
        float | None, typer.Option(help="Pixels between patches; default: inferred from the model.")
    ] = None,
    layers: LayersOption = None,
    layer: FormerLayers = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    image_size: ImageSize = None,
    pixels: Annotated[str | None, PICTURE_PIXELS] = None,
    dtype: Dtype = "float32",
    kind: Kind = None,
    root: Root = None,
    split: Split = None,
    seed: Seed = 0,
    *,
    options: JobOptions,
) -> None:
    """Computes statistics of each attention head over many images: how far and how widely it attends.

    Writes Parquet shards like attnx extract, with a list of one value for each head in the columns entropy, distance,
    max, mass (and importance): means over the queries of an image, layer by layer. When the last shard is made, writes
    probe/heads.csv and heads.parquet (mean, deviation and quantiles over the images, for each head), distance.png,
    entropy.png, sinks.png, heads.png and importance.png. The same command continues a job that was stopped.
    """
    from attnx.jobs.probes import Targets
    from attnx.jobs.recipe import ProbeRecipe
    from attnx.jobs.sources import open_source
    from attnx.ops.statistics import parse

    autocast_of(dtype)
    stats = list(dict.fromkeys(stat)) if stat else None
    if stats:
        parse(stats)
    if patch_size is not None and not 0 < patch_size < 1e6:
        raise ValueError(f"patch-size: expected pixels above 0; got {patch_size:g}")
    notice, model = named_model(model)
    images = open_source(source, kind, root, split)
    if targets is not None:
        Targets(targets).check_keys([entry.key for entry in islice(images.entries(), _FIRST)])
    recipe = ProbeRecipe(
        source=absolute(source), kind=images.kind, root=absolute(root), split=split, model=absolute_model(model),
        pretrained=pretrained, checkpoint=absolute(checkpoint), image_size=pixels_of(image_size), seed=seed,
        method="probe", heads="each", dtype=dtype, map_dtype="float32", max_pixels=options.pixels, pixels=pixels,
        layers=layers_of(layers, layer), stats=stats, targets=absolute(targets), patch_size=patch_size,
    )  # fmt: skip
    run_recipe(recipe, images, out, options, "images", partial(_finish, out), notice, "statistics")


def _finish(out: Path, runtime: "Runtime", report: "Report") -> str:
    """Write the tables and figures if the job is complete; a text that says so, and which layers were left out."""
    from attnx.jobs.job import Job

    more = ""
    for layer, why in runtime.settings["left_out"].items():
        typer.echo(f"{layer} is left out: it {why.removeprefix(f'{layer} ')}; --stat chooses what it has")
    job = Job(out)
    targets = getattr(runtime.task, "targets", None)
    if targets is not None:
        unused = set(targets.of).difference(*job.manifest.key_groups())
        more += f", {len(unused)} keys of --targets are of no image, such as {min(unused)!r:.80}" if unused else ""
    missing = job.shards - len(job.done())
    if missing:
        return f"{more}, no tables yet, since {missing} of {job.shards} shards are missing"
    if report.maps == 0:
        return f"{more}, no tables, since every image has an error"
    for path, what in write_report(out, out / "probe").items():
        typer.echo(f"{path}  {what}")
    return more


def write_report(folder: Path, out: Path) -> dict[Path, str]:
    """Write the tables and figures of a job of `attnx probe`; {path: description}."""
    from attnx.figures.probes import draw_probes
    from attnx.jobs.probe_summary import head_table, write_table
    from attnx.jobs.reader import Maps

    table = head_table(Maps(folder))
    out.mkdir(parents=True, exist_ok=True)
    what = "mean, deviation and quantiles over the images, for each head"
    return dict.fromkeys(write_table([table], out, "heads"), what) | draw_probes(table, out)


@report_errors
def compare(
    folders: Annotated[list[Path], typer.Argument(help="OUT of two or more attnx probe jobs.", **PATH)],
    out: Out = Path("attnx-compare"),
) -> None:
    """Compares the heads of several models: overlays the figures of attnx probe, and joins its tables.

    Writes compare.png, compare.csv and compare.parquet. In the figure, models of the same name are called by their
    folders.
    """
    from attnx.figures.probes import draw_comparison
    from attnx.jobs.probe_summary import compared, write_table
    from attnx.jobs.reader import Maps
    from attnx.messages import say

    if len(folders) < 2:
        raise ValueError(f"folders: expected two or more; got {len(folders)}")
    tables, notices = compared([Maps(folder) for folder in folders])
    for notice in notices:
        say(notice)
    out.mkdir(parents=True, exist_ok=True)
    draw_comparison(tables, out / "compare.png")
    typer.echo(f"{out / 'compare.png'}  a dot for each head of each layer, a colour for each model")
    for path in write_table(tables, out, "compare"):
        typer.echo(f"{path}  mean, deviation and quantiles over the images, for each head of each model")
