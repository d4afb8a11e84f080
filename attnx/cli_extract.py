"""attnx extract: the batch job."""

import time
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
    Method,
    Model,
    Out,
    Preset,
    Pretrained,
    Residual,
    Seed,
    Start,
    autocast_of,
    layers_of,
    prepared,
    rollout_options,
    told,
)

if TYPE_CHECKING:
    import torch

    from attnx.extractor import Extractor
    from attnx.jobs.pixels import Pixels
    from attnx.jobs.sources import Source
    from attnx.models.loading import Loaded


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
    method: Method = "rollout",
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
    workers: Annotated[int | None, typer.Option(help="Threads that decode; one a core unless given.", min=1)] = None,
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
    from attnx.extractor import Extractor
    from attnx.jobs.job import open_job
    from attnx.jobs.packing import DTYPES
    from attnx.jobs.reading import progress_bar
    from attnx.jobs.sources import open_source
    from attnx.jobs.work import run_job

    images = open_source(source, kind, root, split)
    autocast = autocast_of(dtype)
    if map_dtype not in DTYPES:
        raise ValueError(f"map-dtype: expected one of {', '.join(DTYPES)}; got {map_dtype!r}")
    on, loaded = prepared(model, pretrained, checkpoint, image_size, device, seed)
    how = _pixels(loaded, pixels)
    rolling = rollout_options(residual, discard, start, preset) if method == "rollout" else {}
    extractor = Extractor(
        loaded.model, method, layers=layers_of(layer), heads=heads, dtype=autocast, keep=keep, compile=compile,
        model_kwargs=loaded.model_kwargs, **rolling,
    )  # fmt: skip
    _warm_up(extractor, loaded, on)
    settings = {
        "model": loaded.name, "weights": loaded.fingerprint(), "pixels": how.describe(), "method": method,
        "layers": layer, "heads": heads, "dtype": dtype, "map_dtype": map_dtype, "keep": keep,
        "max_pixels": max_pixels, **rolling, "versions": _versions(),
    }  # fmt: skip
    if dry_run:
        _tell_estimate(images, how, extractor, on, batch_size, shard_size or 1024, map_dtype, max_pixels)
        return
    described = {
        "kind": images.kind, "path": str(source.absolute()),
        "root": None if root is None else str(root.absolute()), "split": split,
    }  # fmt: skip
    with open_job(out, images, described, settings, shard_size) as job, progress_bar(job.rows) as progress:
        done = run_job(
            job, images.reader(), how, extractor, batch_size=batch_size, device=on, map_dtype=map_dtype,
            max_pixels=max_pixels, workers=workers, retry_failed=retry_failed, progress=progress,
            say=lambda text: typer.echo(f"attnx: {text}", err=True),
        )  # fmt: skip
        failed = sum(job.errors(shard) for shard in range(job.shards))
    before = f", {done.before} of them by an earlier run" if done.before else ""
    rate = f" ({done.rows / done.seconds:.1f} images/s)" if done.rows else ""
    typer.echo(
        f"{job.rows - failed} maps in {out}{before}{rate}"
        + (f", {failed} images could not be read: see their error column" if failed else "")
    )
    if failed:
        raise typer.Exit(1)


def _pixels(loaded: "Loaded", kind: str | None) -> "Pixels":
    from attnx.jobs.pixels import Pixels

    named = loaded.name.partition(":")
    kind = kind or ("timm" if named[0] == "timm" else "whole")
    return Pixels(
        kind=kind,
        size=(int(loaded.size[0]), int(loaded.size[1])),
        mean=tuple(map(float, loaded.mean)),
        std=tuple(map(float, loaded.std)),
        interpolation=loaded.interpolation,
        crop_pct=loaded.crop_pct,
        crop_mode=loaded.crop_mode,
        processor=named[2] if named[0] == "hf" else None,
    )


def _warm_up(extractor: "Extractor", loaded: "Loaded", on: "torch.device") -> None:
    """The extractor's first call makes its plan in another way, which may round otherwise: it is no image's."""
    import torch

    extractor(torch.zeros(1, 3, *loaded.size, device=on))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from attnx import __version__

    return {"attnx": __version__} | {name: version(name) for name in ("torch", "timm", "transformers", "pillow")}


def _tell_estimate(
    images: "Source", how: "Pixels", extractor: "Extractor", on: "torch.device", batch_size: int, shard_size: int,
    map_dtype: str, max_pixels: int,
) -> None:  # fmt: skip
    """Says how much there is to do, from a batch that is done and not written."""
    from attnx.jobs.job import first_entries
    from attnx.jobs.reading import reader_pool
    from attnx.jobs.work import Maker

    first, count = first_entries(images, batch_size)
    begin = time.perf_counter()
    with reader_pool() as pool:
        maker = Maker(images.reader(), how, extractor, pool, on, batch_size, map_dtype, max_pixels)
        size = maker.table(first).column("map").nbytes
    seconds = (time.perf_counter() - begin) / len(first) * count
    typer.echo(
        f"{count} images ({images.kind}) in {-(-count // shard_size)} shards of {shard_size}; from the first "
        f"{len(first)}: {size / len(first) * count / 2**20:.1f} MB of maps before compression, "
        f"{_duration(seconds)}. Nothing was written."
    )


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} hours" if hours else f"{rest // 60}:{rest % 60:02d} minutes"
