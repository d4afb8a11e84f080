"""Sheets of several photos, or of several models side by side, for `attnx show`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from attnx.figures.one_image import Request, main_map
from attnx.figures.picture import rgb_image
from attnx.figures.sheets import Sheet, near_square
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
    done: Callable[["Loaded"], None] = lambda loaded: None,
) -> Sheet:
    """A sheet of the maps of photos: one model fills a grid; several have a column each, beside the photo.

    One model and one photo of full size are in memory at a time.

    Args:
        photos: (title, function that reads it) of each.
        models: names of the models.
        load: makes a model from its name, on the device.
        request, style: the maps, and how they are drawn. With scale="shared" all maps have one range of colours.
        device: of the models.
        done: called with each model after its maps.
    """
    tiles: list[Image] = []
    columns = []
    for name in models:
        loaded, column = load(name), []
        for _, read in photos:
            picture = read()
            column.append(main_map(picture, loaded, loaded.prepare(picture)[None].to(device), request))
            if len(tiles) < len(photos):
                tiles.append(rgb_image(picture, style.tile))
        done(loaded)
        columns.append(column)
    limits = None
    if style.scale == "shared":
        maps = [shown.amap for column in columns for shown in column]
        limits = min(float(amap.min()) for amap in maps), max(float(amap.max()) for amap in maps)
    drawn = [[shown.over(tile, style, limits) for tile, shown in zip(tiles, column, strict=True)] for column in columns]
    titles = [title for title, _ in photos]
    if len(models) == 1:
        return Sheet(tuple(drawn[0]), tuple(titles), near_square(len(photos)))
    cells = [
        cell
        for title, tile, maps_of_photo in zip(titles, tiles, zip(*drawn, strict=True), strict=True)
        for cell in ((title, tile), *zip(models, maps_of_photo, strict=True))
    ]
    return Sheet(tuple(tile for _, tile in cells), tuple(title for title, _ in cells), 1 + len(models))
