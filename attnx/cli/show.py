"""`attnx show`: the maps of one image, of a folder, or of several models side by side."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnx.cli.options import (
    MODEL,
    PATH,
    Alpha,
    Checkpoint,
    Cmap,
    Device,
    Discard,
    FormerLayers,
    FormerMass,
    HeadsOption,
    ImageSize,
    Interpolation,
    LayersOption,
    Mass,
    Method,
    Out,
    Preset,
    Pretrained,
    Residual,
    Seed,
    Start,
    Token,
    device_of,
    layers_of,
    mass_of,
    method_of,
    one_of,
    prepared,
    report_errors,
    rollout_options,
)
from attnx.messages import say

if TYPE_CHECKING:
    from attnx.figures.photos import Photo
    from attnx.figures.sheets import Sheet
    from attnx.figures.shown import Shown
    from attnx.models.loaded import Loaded


@report_errors
def show(
    image: Annotated[Path, typer.Argument(help="An image file, or a folder of images for a contact sheet.", **PATH)],
    model: Annotated[list[str] | None, MODEL] = None,
    out: Out = Path("attnx-out"),
    method: Method = None,
    token: Token = None,
    layers: LayersOption = None,
    layer: FormerLayers = None,
    heads: HeadsOption = "mean",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    image_size: ImageSize = None,
    device: Device = None,
    residual: Residual = 0.5,
    discard: Discard = 0.0,
    start: Start = 0,
    preset: Preset = None,
    cmap: Cmap = "turbo",
    alpha: Alpha = 0.5,
    interpolation: Interpolation = "bilinear",
    colorbar: Annotated[bool, typer.Option("--colorbar", help="Draw the colours and their values.")] = False,
    scale: Annotated[
        str, typer.Option(help="Range of the colours in a sheet: of [bold]each[/bold] map, or [bold]shared[/bold].")
    ] = "each",
    tile: Annotated[
        int, typer.Option(help="Pixels of the longer side of the pictures in sheets; 0: the image's own size.", min=0)
    ] = 256,
    pdf: Annotated[bool, typer.Option("--pdf", help="Write the sheets as PDF, too, for a paper.")] = False,
    svg: Annotated[bool, typer.Option("--svg", help="Write the sheets as SVG, too.")] = False,
    npz: Annotated[bool, typer.Option("--npz", help="Write the maps as arrays, too: maps.npz.")] = False,
    limit: Annotated[int, typer.Option(help="Of a folder: at most this many images.", min=1)] = 64,
    mass: Mass = 0.6,
    keep: FormerMass = None,
    seed: Seed = 0,
) -> None:
    """Draws the maps of one image, at the image's own size; or a sheet of a folder, or of several models.

    Writes overlay.png (the method's map), heads.png (the class token's map of each head), masks.png (the patches
    with 60 % of each head's mass) and layers.png (every layer, then max, min, mean, and rollout). With --token all are
    of that token. A model without a rollout gets the class token's map, or, without a class token, received.png: how
    much the last layer attends to each patch. If its tokens have no known place in the image, matrix.png has the last
    layer's map, queries by keys. The output says so. With --model twice or more, each has a folder, and models.png has
    their maps side by side. For a folder, contact_sheet.png has the map of each image.
    """
    from attnx.extract.place import Place
    from attnx.figures.one_image import draw
    from attnx.figures.photos import table_of_photos
    from attnx.figures.shown import Request
    from attnx.figures.style import Style
    from attnx.images import read_image

    one_of("scale", scale, ("each", "shared"))
    names = model or ["demo"]
    method = method_of(method, token)
    if len(names) > 1 and checkpoint is not None:
        raise ValueError(f"checkpoint: expected one --model with it; got {len(names)}")
    place = None if token is None else Place.parse(token)
    rolling = rollout_options(residual, discard, start, preset)
    request = Request(method, layers_of(layers, layer), heads, rolling, place)
    style = Style(cmap, alpha, interpolation, mass_of(mass, keep), tile or None, scale, colorbar)
    on = device_of(device)

    def load(name: str) -> "Loaded":
        return prepared(name, pretrained, checkpoint, image_size, device, seed)[1]

    formats = tuple(name for name, wanted in (("pdf", pdf), ("svg", svg)) if wanted)
    folders = _folders(out, names)
    if image.is_dir():
        if npz:
            raise ValueError("npz: expected one image; got a folder; attnx extract writes the maps of a folder")
        sheet = table_of_photos(_photos(image, limit), names, load, request, style, on)
        _write(sheet, out, "contact_sheet", formats)
        return
    picture = read_image(image)

    def draw_one(name: str, loaded: "Loaded", column: "Sequence[Shown | None]" = (None,)) -> None:
        written = draw(picture, loaded, folders[name], request, style, on, formats, npz, shown=column[0])
        for path, what in written.items():
            typer.echo(f"{path}  {what}")

    if len(names) == 1:
        draw_one(names[0], load(names[0]))
        return
    sheet = table_of_photos([(image.name, lambda: picture, picture)], names, load, request, style, on, draw_one)
    _write(sheet, out, "models", formats)


def _photos(folder: Path, limit: int) -> "Iterator[Photo]":
    """The first images of a folder that can be read, each decoded when it is its turn.

    Raises:
        ValueError: no image can be read.
    """
    from attnx.images import ImageError, read_image, walk_images

    count = 0
    for path in walk_images(folder):
        if count == limit:
            say(f"only the first {limit} images; --limit shows more")
            break
        try:
            # No name for the image: it would keep it in memory while the next one is decoded.
            yield path.relative_to(folder).as_posix(), partial(read_image, path), read_image(path)
        except ImageError as error:
            say(str(error))
        else:
            count += 1
    if count == 0:
        raise ValueError(f"image: expected a folder with images that can be read; got {folder}")


def _folders(out: Path, names: list[str]) -> dict[str, Path]:
    """The folder of each model's pictures. Raises ValueError for a model that is named twice."""
    if len(set(names)) < len(names):
        raise ValueError(f"model: expected different models; got {', '.join(names)}")
    if len(names) == 1:
        return {names[0]: out}
    safe = [re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-") or "model" for name in names]
    unique = [part if safe.count(part) == 1 else f"{i}-{part}" for i, part in enumerate(safe)]
    return {name: out / part for name, part in zip(names, unique, strict=True)}


def _write(sheet: "Sheet", out: Path, name: str, formats: tuple[str, ...]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in sheet.save_all(out, name, formats):
        typer.echo(f"{path}  {len(sheet.tiles)} pictures: {', '.join(dict.fromkeys(sheet.titles))}")
