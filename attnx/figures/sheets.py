"""Sheets of pictures: grids of heads and layers, contact sheets, captions. Arguments and errors as in `picture`."""

from __future__ import annotations

import io
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attnx.figures.picture import check, coloured, float_array, rgb_image, save, with_colorbar, write
from attnx.figures.style import Style

if TYPE_CHECKING:
    from attnx.figures.picture import Map, Picture


@dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures with titles, row by row, and the colours of their maps.

    Attributes:
        tiles: the pictures.
        titles: one per picture.
        columns: pictures per row.
        limits: the values of the first and last colour of each picture (None: it has no colours), for a colour bar
            beside each; (): none.
        cmap: name of the colours.
        shared: the values of the first and last colour of all pictures, for one colour bar; None: none.

    Raises:
        ValueError: `limits` has another length than `tiles`.

    Example:
        >>> from PIL import Image
        >>> sheet = attnx.picture.heads_grid(Image.new("RGB", (96, 96)), torch.rand(6, 12, 12), colorbar=True)
        >>> sheet.save("heads.png"), sheet.save("heads.pdf")
        (None, None)
        >>> sheet.image.width > 3 * 96
        True
    """

    tiles: tuple[Image.Image, ...]
    titles: tuple[str, ...]
    columns: int
    limits: tuple[tuple[float, float] | None, ...] = ()
    cmap: str = "turbo"
    shared: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        count = len(self.tiles)
        check(len(self.limits) in (0, count), "limits", f"none, or {count}, one per picture", len(self.limits))

    @cached_property
    def image(self) -> Image.Image:
        """The sheet as one RGB picture; colour bars are on the right of each picture, or of the sheet."""
        each = self.limits or (None,) * len(self.tiles)
        tiles = [t if r is None else with_colorbar(t, r, self.cmap) for t, r in zip(self.tiles, each, strict=True)]
        sheet = contact_sheet(tiles, self.titles, columns=self.columns)
        return sheet if self.shared is None else with_colorbar(sheet, self.shared, self.cmap)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sheet atomically: a .png, or a .pdf or .svg whose titles and colour bars are drawn as vectors.

        Raises:
            ValueError: the name ends in something else.
            OSError: the file can't be written; the error has the path.
        """
        path = Path(path)
        kind = path.suffix.lower().removeprefix(".")
        check(kind in ("png", "pdf", "svg"), "path", "a name that ends in .png, .pdf or .svg", repr(str(path)))
        if kind == "png":
            save(self.image, path)
        else:
            from attnx.figures.vectors import save_vectors

            write(path, partial(save_vectors, self, kind))

    def save_all(self, folder: str | os.PathLike[str], name: str, formats: Sequence[str] = ()) -> list[Path]:
        """Write name.png to the folder, and name.pdf or name.svg for each of `formats`; the paths of the files.

        Raises:
            ValueError: an unknown format.
            OSError: a file can't be written; the error has the path.
        """
        paths = [Path(folder) / f"{name}.{kind}" for kind in ("png", *formats)]
        for path in paths:
            self.save(path)
        return paths

    def _repr_png_(self) -> bytes:
        """The sheet as PNG, for notebooks."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG")
        return buffer.getvalue()


def heads_grid(
    image: Picture,
    maps: Map,
    *,
    interpolation: str = "nearest",
    cmap: str = "turbo",
    alpha: float = 0.6,
    columns: int | None = None,
    tile: int | None = 256,
    scale: str = "each",
    colorbar: bool = False,
) -> Sheet:
    """A grid of overlays, one per head. "head 0" is first.

    Args:
        maps: [H, h, w]. With `cmap="viridis", alpha=1` the pictures are those of DINO's script.
        interpolation, cmap, alpha: see `overlay`.
        columns: pictures per row; None: chosen from their number.
        tile: pixels of a picture's longer side; None: the image's size.
        scale: "each": every map has its own range of colours; "shared": all have the same.
        colorbar: draw the colours and their values beside each picture, or once for all.

    Example:
        >>> from PIL import Image
        >>> attnx.picture.heads_grid(Image.new("RGB", (96, 96)), torch.rand(6, 12, 12), scale="shared").titles[0]
        'head 0'
    """
    heads = float_array(maps, "maps", 3)
    chosen = near_square(len(heads)) if columns is None else columns
    titles = [f"head {i}" for i in range(len(heads))]
    style = Style(cmap, alpha, interpolation, tile=tile, scale=scale, colorbar=colorbar)
    return _sheet(image, [*heads], titles, chosen, style)


def layers_figure(
    image: Picture,
    names: Sequence[str],
    maps: Map,
    rollout: Map | None = None,
    *,
    interpolation: str = "bilinear",
    cmap: str = "turbo",
    alpha: float = 0.5,
    columns: int | None = None,
    tile: int | None = 256,
    scale: str = "each",
    colorbar: bool = False,
) -> Sheet:
    """Every layer's map over the image, then max, min and mean over the layers, and rollout.

    Args:
        names: L titles.
        maps: [L, h, w], for example the CLS map of each layer.
        rollout: [h, w]; None: no rollout.
        interpolation, cmap, alpha: see `overlay`.
        columns, tile, scale, colorbar: see `heads_grid`. Rollout takes part in a shared scale.

    Example:
        >>> from PIL import Image
        >>> sheet = attnx.picture.layers_figure(Image.new("RGB", (96, 96)), ["0", "1"], torch.rand(2, 12, 12))
        >>> sheet.titles
        ('0', '1', 'max', 'min', 'mean')
    """
    layers = float_array(maps, "maps", 3)
    check(len(names) == len(layers), "names", f"{len(layers)}, one for each of the maps", len(names))
    summary = {"max": layers.max(0), "min": layers.min(0), "mean": layers.mean(0)}
    if rollout is not None:
        summary["rollout"] = float_array(rollout, "rollout", 2)
    # If the layers fill whole rows, the summary gets a row of its own.
    chosen = near_square(len(layers), len(summary)) if columns is None else columns
    style = Style(cmap, alpha, interpolation, tile=tile, scale=scale, colorbar=colorbar)
    return _sheet(image, [*layers, *summary.values()], [*names, *summary], chosen, style)


def _sheet(image: Picture, maps: Sequence[np.ndarray], titles: Sequence[str], columns: int, style: Style) -> Sheet:
    """The sheet of the overlays of maps [h, w] over one image."""
    check(columns > 0, "columns", "at least 1", columns)
    small = rgb_image(image, style.tile)
    shared = shared_range(maps, style)
    found = [coloured(small, amap, style.interpolation, style.cmap, style.alpha, shared) for amap in maps]
    return sheet_of(found, titles, columns, style, shared)


def sheet_of(
    cells: Sequence[tuple[Image.Image, tuple[float, float] | None]], titles: Sequence[str], columns: int, style: Style,
    shared: tuple[float, float] | None,
) -> Sheet:  # fmt: skip
    """The sheet of (picture, limits of its colours), with the colour bars of the style.

    shared: that of `shared_range`.
    """
    limits = tuple(each for _, each in cells) if style.colorbar and shared is None else ()
    bar = shared if style.colorbar else None
    return Sheet(tuple(tile for tile, _ in cells), tuple(titles), columns, limits, style.cmap, bar)


def shared_range(maps: Sequence[Map], style: Style) -> tuple[float, float] | None:
    """The smallest and the largest value of all maps, if the style's scale is shared and there are maps; else None."""
    if style.scale != "shared" or not maps:
        return None
    return min(float(amap.min()) for amap in maps), max(float(amap.max()) for amap in maps)


def contact_sheet(
    images: Sequence[Picture],
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    tile: int | None = None,
) -> Image.Image:
    """Pictures of any sizes on a white grid, row by row, each under its title.

    Args:
        images: at least one.
        titles: one per image, or None. An ellipsis replaces the middle of a title that is too wide.
        columns: pictures per row; None: chosen from their number.
        tile: pixels of the longer side of each picture; None: their own sizes.
    """
    check(len(images) > 0, "images", "at least one", "none")
    columns = near_square(len(images)) if columns is None else columns
    check(columns > 0, "columns", "at least 1", columns)
    texts = [""] * len(images) if titles is None else titles
    check(len(texts) == len(images), "titles", f"{len(images)}, one for each of the images", len(texts))
    tiles = [rgb_image(image, tile) for image in images]
    width = max(64, *(item.width for item in tiles))
    heights = [max(item.height for item in tiles[at : at + columns]) for at in range(0, len(tiles), columns)]
    gap = max(8, width // 20)
    font = ImageFont.load_default(size=min(max(width // 15, 11), 32))
    caption = math.ceil(1.4 * font.getbbox("Ag")[3]) if any(texts) else 0
    across = gap + (width + gap) * min(columns, len(tiles))
    down = gap + sum(caption + height + gap for height in heights)
    sheet = Image.new("RGB", (across, down), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(tiles):
        row, column = divmod(index, columns)
        left = gap + (width + gap) * column
        top = gap + sum(caption + height + gap for height in heights[:row])
        sheet.paste(picture, (left + (width - picture.width) // 2, top + caption))
        title = _shorten(texts[index], lambda text: font.getlength(text) <= width - gap)
        draw.text((left + width / 2, top), title, fill="#282828", font=font, anchor="ma")
    return sheet


def captioned(image: Picture, text: str) -> Image.Image:
    """The image with a text on white below it, wrapped into lines.

    Args:
        text: newlines and other control characters count as spaces.
    """
    image = rgb_image(image)
    margin = min(max(image.width // 60, 14), 28)
    font, step = ImageFont.load_default(size=margin), math.ceil(1.4 * margin)
    lines = _wrapped(text, lambda line: font.getlength(line) <= image.width - 2 * margin)
    result = Image.new("RGB", (image.width, image.height + step * len(lines) + margin), "white")
    result.paste(image)
    draw = ImageDraw.Draw(result)
    for number, line in enumerate(lines):
        draw.text((margin, image.height + step * number), line, fill="#282828", font=font)
    return result


def near_square(count: int, least: int = 1) -> int:
    """The smallest number of columns from max(sqrt(count), least) to twice that that fills all rows; else the first."""
    root = max(math.ceil(math.sqrt(count)), least)
    return next((columns for columns in range(root, 2 * root + 1) if count % columns == 0), root)


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in lines that fit. A word that is too long for a line is broken at any character."""
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer):
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if lines[-1] and not fits(lines[-1] + character):
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def _shorten(title: str, fits: Callable[[str], bool]) -> str:
    title = " ".join(title.split())
    if fits(title):
        return title

    def keep(count: int) -> str:
        # The middle is cut, because the names of neighbouring layers differ near their end.
        return f"{title[: (count + 1) // 2].rstrip()}…{title[len(title) - count // 2 :].lstrip()}"

    too_many = bisect_left(range(len(title)), True, key=lambda count: not fits(keep(count)))
    return keep(max(0, too_many - 1))
