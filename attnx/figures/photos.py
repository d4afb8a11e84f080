"""Sheets of several photos, or of several models side by side, for `attnx show`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from attnx.figures.picture import rgb_image
from attnx.figures.sheets import Sheet, near_square
from attnx.figures.shown import Request, Shown, extractor_of, main_map
from attnx.figures.style import Style

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Loaded


def table_of_photos(
    photos: Sequence[tuple[str, Callable[[], "Image"]]],
    models: Sequence[str],
    load: Callable[[str], "Loaded"],
    request: Request,
    style: Style,
    device: torch.device,
    done: Callable[[str, "Loaded"], None] = lambda name, loaded: None,
) -> Sheet:
    """A sheet of the maps of photos: one model fills a grid; several have a column each, beside the photo.

    One model and one photo of full size are in memory at a time.

    Args:
        photos: (title, function that reads it) of each.
        models: names of the models.
        load: makes a model from its name, on the device.
        request, style: the maps, and how they are drawn. With scale="shared" all maps have one range of colours.
        device: of the models.
        done: called with the name of each model, and the model, after its maps.
    """
    tiles: list[Image] = []
    columns = []
    for name in models:
        loaded, column = load(name), list[Shown]()
        extract = extractor_of(loaded, request)
        for _, read in photos:
            picture = read()
            column.append(main_map(picture, loaded, loaded.prepare(picture)[None].to(device), request, extract))
            if len(tiles) < len(photos):
                tiles.append(rgb_image(picture, style.tile))
        done(name, loaded)
        columns.append(column)
    shared = _range(columns) if style.scale == "shared" else None
    drawn = [[shown.over(tile, style, shared) for tile, shown in zip(tiles, column, strict=True)] for column in columns]
    titles = [title for title, _ in photos]
    # A cell is a title, a picture, and the limits of its colours.
    cells: list[tuple[str, Image, tuple[float, float] | None]] = []
    for i, (title, tile) in enumerate(zip(titles, tiles, strict=True)):
        if len(models) == 1:
            cells.append((title, *drawn[0][i]))
        else:
            cells += [(title, tile, None), *((name, *column[i]) for name, column in zip(models, drawn, strict=True))]
    limits = () if not style.colorbar else tuple(limits for *_, limits in cells) if shared is None else (shared,)
    columns_of_sheet = near_square(len(photos)) if len(models) == 1 else 1 + len(models)
    pictures = tuple(tile for _, tile, _ in cells)
    return Sheet(pictures, tuple(title for title, *_ in cells), columns_of_sheet, limits, style.cmap)


def _range(columns: list[list[Shown]]) -> tuple[float, float]:
    """The smallest and the largest value of all maps, except matrices."""
    maps = [shown.amap for column in columns for shown in column if shown.name != "matrix"]
    return (min(float(amap.min()) for amap in maps), max(float(amap.max()) for amap in maps)) if maps else (0.0, 1.0)
