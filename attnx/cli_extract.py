"""attnx extract: the batch job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnx.cli_options import (
    BatchSize,
    Checkpoint,
    Device,
    Discard,
    Dtype,
    Heads,
    ImageSize,
    Layer,
    Model,
    Out,
    Preset,
    Pretrained,
    Residual,
    Seed,
    Start,
    autocast_of,
    device_of,
    devices_of,
    layers_of,
    pixels_of,
    rollout_options,
    told,
)

if TYPE_CHECKING:
    from attnx.jobs.run import Report

ENGINES = ("local", "ranks", "ray")


@told
def extract(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of images (read recursively), one image, a table (.parquet, .csv, .tsv, .jsonl) with the "
            "columns path, key, caption, webdataset tars, or a data set of save_to_disk."
        ),
    ],
    model: Model = "demo",
    out: Out = Path("attnx-out"),
    method: Annotated[
        str | None,
        typer.Option(
            help="[bold]rollout[/bold] through all layers (unless given), [bold]cls[/bold]: the class token's map in "
            "one layer, [bold]layers[/bold]: in every layer."
        ),
    ] = None,
    layer: Layer = None,
    heads: Heads = "mean",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    image_size: ImageSize = None,
    pixels: Annotated[
        str | None,
        typer.Option(
            help="[bold]timm[/bold]: timm's own evaluation transform, crop included (unless given, of timm: models); "
            "[bold]whole[/bold]: the whole picture (of others); [bold]processor[/bold]: Hugging Face's own (hf:)."
        ),
    ] = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    map_dtype: Annotated[str, typer.Option(help="float16, float32 or uint8, beside a scale of each map.")] = "float16",
    store: Annotated[
        str,
        typer.Option(
            help="[bold]map[/bold]: the method's; [bold]rows[/bold]: the class token's of every layer and head; "
            "[bold]full[/bold]: the whole maps of every layer and head, in safetensors files beside the shards."
        ),
    ] = "map",
    keep: Annotated[
        str, typer.Option(help="Of every layer, for rollout: map, qk (memory linear in the tokens), or auto.")
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Record CUDA graphs: for small batches.")] = False,
    device: Device = None,
    kind: Annotated[str | None, typer.Option(help="What SOURCE is: folder, table, tar or dataset.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of a table's paths; its own unless given.")] = None,
    split: Annotated[str | None, typer.Option(help="Of a data set that has several.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Rows of a shard; 1024 unless given.")] = None,
    max_pixels: Annotated[int, typer.Option(help="A larger picture is its row's error.", min=1)] = 178_956_970,
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode; one a core unless given; 0: this one does.", min=0)
    ] = None,
    decode_timeout: Annotated[float, typer.Option(help="Seconds for an image; then it is its row's error.")] = 120.0,
    engine: Annotated[
        str,
        typer.Option(
            help="[bold]local[/bold]: a process for each of --device cuda:0,cuda:1; [bold]ranks[/bold]: this run is "
            "one of several that share OUT (torchrun, srun, SLURM arrays, --rank, --world); [bold]ray[/bold]: actors."
        ),
    ] = "local",
    rank: Annotated[int | None, typer.Option(help="Ranks: which one this is, from 0.")] = None,
    world: Annotated[int | None, typer.Option(help="Ranks: of how many.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray: of the cluster; a local one unless given.")] = None,
    actors: Annotated[int | None, typer.Option(help="Ray: how many; one a GPU, or a machine.", min=1)] = None,
    actor_cpus: Annotated[int | None, typer.Option(help="Ray: of each; what there are, divided.", min=1)] = None,
    tries: Annotated[int, typer.Option(help="Of a shard whose process dies; then it is set aside.", min=1)] = 3,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do rows with an error again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell counts, size and time, from one batch; write nothing.")
    ] = False,
    residual: Residual = 0.5,
    discard: Discard = 0.0,
    start: Start = 0,
    preset: Preset = None,
    seed: Seed = 0,
) -> None:
    """Writes the maps of many images as Parquet shards; run again, it goes on where it was stopped.

    A row: key, text (caption), map (list) with its shape and scale (map * scale are the values), width and height of
    the image, crop (the part of it that the map covers), error (null if all went well). An image that can't be read
    becomes a row with an error, and the job goes on. manifest.parquet is the list of images, fixed by the first run;
    run.json what the maps are made with, and a later run with anything else is refused.
    """
    from attnx.jobs.decoding import start_server
    from attnx.jobs.engines.cluster import Cluster
    from attnx.jobs.engines.here import rank_of
    from attnx.jobs.estimate import estimate
    from attnx.jobs.job import open_job
    from attnx.jobs.packing import DTYPES, STORES
    from attnx.jobs.reading import progress_bar
    from attnx.jobs.recipe import Recipe, Running
    from attnx.jobs.run import run_job
    from attnx.jobs.sources import open_source

    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}; got {engine!r}")
    ours = rank_of(rank, world) if engine == "ranks" else None
    if ours is None and (rank, world) != (None, None):
        raise ValueError(f"rank, world: they are for --engine ranks; got --engine {engine}")
    cluster = Cluster(address, actors, actor_cpus) if engine == "ray" else None
    if cluster is None and (address, actors, actor_cpus) != (None, None, None):
        raise ValueError(f"address, actors, actor-cpus: they are for --engine ray; got --engine {engine}")
    images = open_source(source, kind, root, split)
    autocast_of(dtype)
    if map_dtype not in DTYPES:
        raise ValueError(f"map-dtype: expected one of {', '.join(DTYPES)}; got {map_dtype!r}")
    if store not in STORES:
        raise ValueError(f"store: expected one of {', '.join(STORES)}; got {store!r}")
    if store != "map" and (method, heads, compile) != (None, "mean", False):
        raise ValueError(f"method, heads, compile: they are for --store map; got --store {store}")
    method = method or "rollout"
    devices = devices_of(device)
    if len(devices) > 1 and engine != "local":
        raise ValueError(f"device: several are for --engine local; got {device} with --engine {engine}")
    start_server()
    recipe = Recipe(
        source=str(source.absolute()), kind=images.kind, root=None if root is None else str(root.absolute()),
        split=split, model=_absolute(model), pretrained=pretrained,
        checkpoint=None if checkpoint is None else str(checkpoint.absolute()), image_size=pixels_of(image_size),
        seed=seed, pixels=pixels, method=method, layers=layers_of(layer), heads=heads, keep=keep, dtype=dtype,
        compile=compile, rolling=rollout_options(residual, discard, start, preset) if method == "rollout" else {},
        map_dtype=map_dtype, store=store, max_pixels=max_pixels,
    )  # fmt: skip
    tools = recipe.load(device_of(devices[0]))
    running = Running(batch_size, workers, decode_timeout)
    if dry_run:
        typer.echo(estimate(tools, running, shard_size))
        return
    with (
        open_job(
            out, images, recipe.describe_source(), tools.settings(), recipe.to_json(), shard_size, tools.row_bytes, ours
        ) as job,
        progress_bar(job.rows) as progress,
    ):
        report = run_job(
            tools, job, running, devices=devices, cluster=cluster, rank=ours, tries=tries, retry_failed=retry_failed,
            progress=progress, say=lambda text: typer.echo(f"attnx: {text}", err=True),
        )  # fmt: skip
    if report.made:
        typer.echo(report.stage_table())
    of_rank = "" if ours is None else f"rank {ours.rank} of {ours.world}: "
    before = f", {report.before} rows of an earlier run" if report.before else ""
    rate = f" ({report.made / report.seconds:.1f} images/s)" if report.made else ""
    typer.echo(f"{of_rank}{report.maps} maps in {out}{before}{rate}{_wrong(report)}")
    if report.errors or report.set_aside:
        raise typer.Exit(1)


def _wrong(report: "Report") -> str:
    text = f", {report.errors} images have no map: see their error column" if report.errors else ""
    if report.set_aside:
        shards = ", ".join(map(str, sorted(report.set_aside)))
        text += f", shards that could not be made: {shards}; run again to try them again"
    return text


def _absolute(model: str) -> str:
    """A folder's name as any process on this machine understands it."""
    kind, _, name = model.partition(":")
    return f"{kind}:{Path(name).absolute()}" if kind == "hf" and Path(name).is_dir() else model
