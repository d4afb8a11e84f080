"""Sheets of several photos, or of several models side by side, for `attnx show`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from attnx.figures.picture import rgb_image
from attnx.figures.sheets import Sheet, near_square, shared_range, sheet_of
from attnx.figures.shown import Request, Shown, extractor_of, main_map
from attnx.figures.style import Style

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Loaded

Photo = tuple[str, Callable[[], "Image"], "Image"]
"""A title, the function that reads the photo again, and the photo."""


def table_of_photos(
    photos: Iterable[Photo],
    models: Sequence[str],
    load: Callable[[str], "Loaded"],
    request: Request,
    style: Style,
    device: torch.device,
    done: Callable[[str, "Loaded", list[Shown]], None] = lambda name, loaded, column: None,
) -> Sheet:
    """A sheet of the maps of photos: one model fills a grid; several have a column each, beside the photo.

    One model and one photo of full size are in memory at a time, and the pictures of the sheet: with `style.tile` None
    these are all photos at full size.

    Args:
        photos: at least one. The first is taken before any model is loaded. The first model takes the others one by
            one; later models read them again.
        models: names of the models.
        load: makes a model from its name, on the device.
        request, style: the maps, and how they are drawn. With scale="shared" all maps have one range of colours.
        device: of the models.
        done: called with the name of each model, the model, and its map of each photo.
    """
    titles: list[str] = []
    reads: list[Callable[[], Image]] = []
    tiles: list[Image] = []

    def first() -> "Iterator[Image]":
        for title, read, picture in photos:
            titles.append(title)
            reads.append(read)
            tiles.append(rgb_image(picture, style.tile))
            yield picture
            # Before the next photo is read.
            del picture

    columns: list[list[Shown]] = []
    for name in models:
        pictures = (read() for read in reads) if columns else first()
        columns.append(_column(name, pictures, load, request, device, done))
    maps = [shown.amap for column in columns for shown in column if shown.name != "matrix"]
    shared = shared_range(maps, style)
    drawn = [
        [shown.over(tile, style, shared, style.tile) for tile, shown in zip(tiles, column, strict=True)]
        for column in columns
    ]
    if len(models) == 1:
        return sheet_of(drawn[0], titles, near_square(len(titles)), style, shared)
    cells: list[tuple[Image, tuple[float, float] | None]] = []
    for tile, *row in zip(tiles, *drawn, strict=True):
        cells += [(tile, None), *row]
    return sheet_of(cells, [text for title in titles for text in (title, *models)], 1 + len(models), style, shared)


def _column(
    name: str, pictures: Iterator["Image"], load: Callable[[str], "Loaded"], request: Request, device: torch.device,
    done: Callable[[str, "Loaded", list[Shown]], None],
) -> list[Shown]:  # fmt: skip
    """The map of each picture by one model. The model is freed when this returns."""
    column: list[Shown] = []
    loaded = extract = None
    for picture in pictures:
        if loaded is None:
            # After the first picture: if no photo can be read, that is an error, and no model is needed.
            loaded = load(name)
            extract = extractor_of(loaded, request)
        column.append(main_map(picture, loaded, loaded.prepare(picture)[None].to(device), request, extract))
        # Before the next picture is read.
        del picture
    assert loaded is not None, "no photos"
    done(name, loaded, column)
    return column
