"""`attnx explore`: an interactive page of one image."""

from pathlib import Path
from typing import Annotated

import typer

from attnx.cli.advice import in_options
from attnx.cli.options import (
    MODEL,
    PATH,
    Checkpoint,
    Device,
    ImageSize,
    LayersOption,
    Pretrained,
    Seed,
    layers_of,
    named_model,
    one_of,
    prepared,
    report_errors,
)
from attnx.messages import say


@report_errors
def explore(
    image: Annotated[Path, typer.Argument(help="An image file.", **PATH)],
    model: Annotated[str | None, MODEL] = None,
    out: Annotated[Path, typer.Option(help="The page to write.", **PATH)] = Path("attnx-explore.html"),
    heads: Annotated[
        str, typer.Option(help="How heads are fused: mean, max or min; [bold]each[/bold]: the page has every head.")
    ] = "mean",
    layers: LayersOption = None,
    pool: Annotated[
        int | None,
        typer.Option(
            help="Store the mean of POOL x POOL keys. Default: 1, or as much as is needed so that the maps take at "
            "most 15 MB.",
            min=1,
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    image_size: ImageSize = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Writes a page in which pointing at a patch of the image shows what it attends to, in each layer and head.

    The page is one HTML file, which opens in any browser, without a server and without a connection. It has the maps
    of all layers, their mean, max and min, and rollout. A value in it is off by less than 1/255 of its map's maximum.
    """
    from attnx.images import read_image
    from attnx.page.explore import explore as page_of
    from attnx.page.page import check_name

    check_name(out, "out")
    one_of("heads", heads, ("mean", "max", "min", "each"))
    picture = read_image(image)
    notice, name = named_model(model)
    if notice:
        say(notice)
    loaded = prepared(name, pretrained, checkpoint, image_size, device, seed)[1]
    title = f"{image.name}, {loaded.name}" + (" (random weights)" * (not pretrained and checkpoint is None))
    chosen = layers_of(layers, None)
    one = chosen[0] if chosen and len(chosen) == 1 else chosen
    page = page_of(loaded, picture, heads=heads, layers=one, pool=pool, title=title)
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    typer.echo(f"{out}  {out.stat().st_size / 1e6:.1f} MB: open it in a browser")
    for note in page.notes:
        typer.echo(in_options(note))
