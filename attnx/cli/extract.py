"""`attnx extract`: the batch job for maps of images."""

from pathlib import Path
from typing import Annotated

import typer

from attnx.cli.job_options import (
    JobOptions,
    Kind,
    MapDtype,
    Root,
    Split,
    absolute,
    runs_jobs,
)
from attnx.cli.options import (
    MODEL,
    PICTURE_PIXELS,
    SOURCE,
    Checkpoint,
    Discard,
    Dtype,
    FormerLayers,
    HeadsOption,
    ImageSize,
    LayersOption,
    Method,
    Out,
    Preset,
    Pretrained,
    Residual,
    Seed,
    Start,
    absolute_model,
    autocast_of,
    layers_of,
    method_of,
    named_model,
    one_of,
    pixels_of,
    report_errors,
    rollout_options,
)
from attnx.cli.run_job import run_recipe


@report_errors
@runs_jobs
def extract(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of images (read recursively), one image, a table (.parquet, .csv, .tsv, .jsonl) with the "
            "columns path, key, caption, webdataset tars, or a data set written by save_to_disk. A URL such as "
            "s3://bucket/folder is opened by fsspec.",
            **SOURCE,
        ),
    ],
    model: Annotated[str | None, MODEL] = None,
    out: Out = Path("attnx-out"),
    method: Method = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="The map of this token, in the last layer over patches, or in each of --layers: X%,Y% in shares of "
            "what the model sees, or the index of a token (0: the class token).",
            show_default=False,
        ),
    ] = None,
    layers: LayersOption = None,
    layer: FormerLayers = None,
    heads: HeadsOption = "mean",
    store: Annotated[
        str,
        typer.Option(
            help="[bold]map[/bold]: the method's map, [bold]rows[/bold]: the class token's of every layer and head; "
            "[bold]full[/bold]: the whole maps of all layers and heads, in a safetensors file per shard."
        ),
    ] = "map",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    image_size: ImageSize = None,
    pixels: Annotated[str | None, PICTURE_PIXELS] = None,
    dtype: Dtype = "float32",
    map_dtype: MapDtype = "float16",
    keep: Annotated[
        str, typer.Option(help="Kept of every layer for rollout: map, qk (memory linear in the tokens), or auto.")
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use CUDA graphs, which helps for small batches.")] = False,
    kind: Kind = None,
    root: Root = None,
    split: Split = None,
    residual: Residual = 0.5,
    discard: Discard = 0.0,
    start: Start = 0,
    preset: Preset = None,
    seed: Seed = 0,
    *,
    options: JobOptions,
) -> None:
    """Writes the maps of many images as Parquet shards. The same command continues a job that was stopped.

    Columns: key, text (caption), map (list) with its shape and scale (the values are map * scale), width and height of
    the image, crop (the part of it that the map covers), error (null without an error). An image that can't be read
    becomes a row with an error, and the job continues. manifest.parquet is the list of images, fixed by the first run.
    run.json has the settings; a later run with other settings is an error.
    """
    from attnx.extract.place import Place
    from attnx.jobs.packing import DTYPES, STORES
    from attnx.jobs.recipe import ExtractRecipe
    from attnx.jobs.sources import open_source

    autocast_of(dtype)
    one_of("map-dtype", map_dtype, DTYPES)
    one_of("store", store, STORES)
    if store != "map" and (method, heads, compile, token) != (None, "mean", False, None):
        raise ValueError(f"method, heads, compile, token: only for --store map; got --store {store}")
    method = method_of(method, token)
    if token is not None:
        # The recipe parses it after the model is loaded.
        Place.parse(token)
    notice, model = named_model(model)
    images = open_source(source, kind, root, split)
    recipe = ExtractRecipe(
        source=absolute(source), kind=images.kind, root=absolute(root), split=split, model=absolute_model(model),
        pretrained=pretrained, checkpoint=absolute(checkpoint), image_size=pixels_of(image_size), seed=seed,
        method=method, heads=heads, dtype=dtype, map_dtype=map_dtype, max_pixels=options.pixels, pixels=pixels,
        layers=layers_of(layers, layer), keep=keep, compile=compile, store=store,
        rolling=rollout_options(residual, discard, start, preset) if method == "rollout" else {}, token=token,
    )  # fmt: skip
    run_recipe(recipe, images, out, options, "images", notice=notice)
