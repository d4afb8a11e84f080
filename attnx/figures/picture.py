"""Pictures of maps: heat over an image, grids of heads and of layers, mask contours, contact sheets.

A map is a torch tensor (any device, any real dtype) or a numpy array. An image is a `PIL.Image` or a uint8
array [H, W, 3], of any size. Every picture is an RGB `PIL.Image`. A wrong argument (shape, dtype, range, an
unknown name, nothing in it, NaN or inf) raises `ValueError`: its name, what was expected, what came.
"""

from __future__ import annotations

import math
import os
import uuid
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

if TYPE_CHECKING:
    import torch

    Map: TypeAlias = torch.Tensor | np.ndarray
    Picture: TypeAlias = Image.Image | np.ndarray


def heat(
    amap: Map, size: tuple[int, int] | Picture, *, interpolation: str = "bilinear", normalize: str | None = "minmax"
) -> np.ndarray:
    """[H, W] float32 in 0..1: a map at the size of its image.

    Args:
        amap: [h, w] real; NaN or inf raises `ValueError` with how many.
        size: the image itself (recommended), or (height, width) in pixels. PIL's `image.size` is (width, height).
        interpolation: "bilinear" | "nearest", as `F.interpolate` with `align_corners=False`.
        normalize: "minmax" stretches the resized map to 0..1, a constant one to zeros; "max" divides it by
            its maximum, what is negative gives 0; None takes it as it is, which must be in 0..1.

    Warns:
        UserWarning: the map is wider than high and `size`, given in numbers, higher than wide; or the reverse.
    """
    _check(normalize in ("minmax", "max", None), "normalize", "minmax, max or None", repr(normalize))
    array = _floats(amap, "amap", 2)
    resized = _resize(array, _target(size, array.shape), interpolation)
    low, high = resized.min(), resized.max()
    if normalize is None:
        _check(low > -1e-5 and high < 1 + 1e-5, "amap", "0..1 with normalize=None", f"{low:.4g}..{high:.4g}")
        return resized.clip(0, 1)
    low = low if normalize == "minmax" else np.float32(0)
    # A constant map is resized with rounding noise; stretched, that noise would fill the picture.
    if high - low <= 8 * np.finfo(np.float32).eps * np.abs(resized).max():
        return np.zeros_like(resized)
    return ((resized - low) / (high - low)).clip(0, 1)


def overlay(
    image: Picture, amap: Map, *, interpolation: str = "bilinear", colormap: str = "turbo", alpha: float = 0.5
) -> Image.Image:
    """The image under a coloured map, at the image's own size: `(1 - alpha) * image + alpha * colours`.

    Args:
        amap, interpolation: see `heat`, which stretches the map to the whole range of colours.
        colormap: a name in `matplotlib.colormaps`.
        alpha: 0, the image alone, to 1, the colours alone.
    """
    from matplotlib import colormaps

    _check(colormap in colormaps, "colormap", "turbo, jet, viridis or another of matplotlib", repr(colormap))
    _check(0 <= alpha <= 1, "alpha", "0..1", alpha)
    image = _rgb(image)
    scores = heat(amap, image, interpolation=interpolation)
    return Image.blend(image, Image.fromarray(colormaps[colormap](scores, bytes=True)[..., :3]), alpha)


def heads_grid(
    image: Picture,
    maps: Map,
    *,
    interpolation: str = "nearest",
    colormap: str = "turbo",
    alpha: float = 0.6,
    columns: int | None = None,
    tile: int | None = 256,
) -> Image.Image:
    """A grid of overlays, one a head, "head 0" first; each has its own colour scale.

    Args:
        maps: [H, h, w]. With `colormap="viridis", alpha=1` the pictures are those of DINO's script.
        interpolation, colormap, alpha: see `overlay`.
        columns: pictures in a row; None chooses.
        tile: pixels of a picture's longer side; None keeps the image's size.
    """
    draw = partial(overlay, _rgb(image, tile), interpolation=interpolation, colormap=colormap, alpha=alpha)
    heads = _floats(maps, "maps", 3)
    chosen = _columns(len(heads)) if columns is None else columns
    return contact_sheet([*map(draw, heads)], [f"head {i}" for i in range(len(heads))], columns=chosen)


def layers_figure(
    image: Picture,
    names: Sequence[str],
    maps: Map,
    rollout: Map | None,
    *,
    interpolation: str = "bilinear",
    colormap: str = "turbo",
    alpha: float = 0.5,
    columns: int | None = None,
    tile: int | None = 256,
) -> Image.Image:
    """Every layer's map over the image, then max, min and mean over the layers, and rollout.

    Args:
        names: L titles.
        maps: [L, h, w], as a rule each layer's CLS map; each has its own colour scale.
        rollout: [h, w]; None leaves it out.
        interpolation, colormap, alpha, columns, tile: see `overlay` and `heads_grid`.
    """
    layers = _floats(maps, "maps", 3)
    _check(len(names) == len(layers), "names", f"{len(layers)}, one for each of the maps", len(names))
    summary = {"max": layers.max(0), "min": layers.min(0), "mean": layers.mean(0)}
    if rollout is not None:
        summary["rollout"] = _floats(rollout, "rollout", 2)
    draw = partial(overlay, _rgb(image, tile), interpolation=interpolation, colormap=colormap, alpha=alpha)
    # The layers choose the columns, so that where they fill their rows the summary has its own.
    chosen = _columns(len(layers), len(summary)) if columns is None else columns
    return contact_sheet([*map(draw, [*layers, *summary.values()])], [*names, *summary], columns=chosen)


def mask_contour(
    image: Picture, mask: Map, *, color: str | tuple[int, int, int] = "#ff2d55", alpha: float = 0.5
) -> Image.Image:
    """The image with a mask tinted and a line along the mask's border, at the image's own size.

    Args:
        mask: [h, w] bool, upsampled nearest. An empty one gives the image, a full one has no border.
        color: a name or "#rrggbb", or (r, g, b) in 0..255.
        alpha: 0, the line alone, to 1, a solid mask.
    """
    _check(0 <= alpha <= 1, "alpha", "0..1", alpha)
    image = _rgb(image)
    cells = _resize(_floats(mask, "mask", 2, kinds="b"), (image.height, image.width), "nearest")
    try:
        solid = Image.new("RGB", image.size, color)
    except (TypeError, ValueError) as error:
        raise ValueError(f"color: expected a name, '#rrggbb' or (r, g, b), got {color!r}") from error
    inside = Image.fromarray((255 * cells).astype(np.uint8))
    reach = 2 * max(1, min(image.size) // 240) + 1
    outer, inner = inside.filter(ImageFilter.MaxFilter(reach)), inside.filter(ImageFilter.MinFilter(reach))
    tinted = Image.composite(Image.blend(image, solid, alpha), image, inside)
    return Image.composite(solid, tinted, ImageChops.difference(outer, inner))


def contact_sheet(
    images: Sequence[Picture], titles: Sequence[str] | None, *, columns: int, tile: int | None = None
) -> Image.Image:
    """Pictures of any sizes on a white grid, row by row, each under its title.

    Args:
        images: at least one.
        titles: one an image, or None. One that is too wide loses its middle to an ellipsis.
        columns: pictures in a row.
        tile: pixels of every picture's longer side; None keeps their sizes.
    """
    _check(columns > 0, "columns", "at least 1", columns)
    _check(len(images) > 0, "images", "at least one", "none")
    texts = [""] * len(images) if titles is None else titles
    _check(len(texts) == len(images), "titles", f"{len(images)}, one for each of the images", len(texts))
    tiles = [_rgb(image, tile) for image in images]
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
    """The image with a text under it, on white: the characters as they are, in as many lines as they need.

    Args:
        text: newlines and other control characters count as spaces.
    """
    image = _rgb(image)
    margin = min(max(image.width // 60, 14), 28)
    font, step = ImageFont.load_default(size=margin), math.ceil(1.4 * margin)
    lines = _wrapped(text, lambda line: font.getlength(line) <= image.width - 2 * margin)
    whole = Image.new("RGB", (image.width, image.height + step * len(lines) + margin), "white")
    whole.paste(image)
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        draw.text((margin, image.height + step * number), line, fill="#282828", font=font)
    return whole


def save(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """A PNG under its final name (.png), whole or not at all; a file that stood there is replaced.

    Raises:
        OSError: a missing or read-only folder, a full disk, ...; names the path.
    """
    path = Path(path)
    _check(path.suffix.lower() == ".png", "path", "a name that ends in .png", repr(str(path)))
    # Not by tempfile, whose files only their owner may read.
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            image.save(file, format="PNG")
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if os.path.exists(unfinished):
            unfinished.unlink()


def _check(good: bool | np.bool_, name: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _floats(value: Map, name: str, ndim: int, kinds: str = "fiub") -> np.ndarray:
    if not isinstance(value, np.ndarray) and hasattr(value, "detach"):
        # numpy has no bfloat16.
        value = (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
    array = np.asarray(value)
    expected = f"{'bool' if kinds == 'b' else 'real'} {'[h, w]' if ndim == 2 else '[maps, h, w]'}, not empty"
    fits = array.ndim == ndim and array.size > 0 and array.dtype.kind in kinds
    _check(fits, name, expected, f"{array.dtype} {list(array.shape)}")
    # A copy, because torch warns of memory that is read-only.
    array = np.array(array, dtype=np.float32, order="C")
    bad = array.size - np.isfinite(array).sum()
    _check(bad == 0, name, "finite values", f"{bad} of {array.size} NaN or inf")
    return array


def _target(size: tuple[int, int] | Picture, shape: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) of a size, or of the image that was given for it."""
    if isinstance(size, Image.Image) or (isinstance(size, np.ndarray) and size.ndim != 1):
        image = size if isinstance(size, Image.Image) else _rgb(size)
        return image.height, image.width
    pair = len(size) == 2 if isinstance(size, (tuple, list, np.ndarray)) else False
    _check(pair and min(size) > 0, "size", "(H, W), both at least 1, or the image", size)
    (height, width), (rows, columns) = size, shape
    if (height - width) * (rows - columns) < 0:
        warnings.warn(
            f"size: taken as (height, width) = ({height}, {width}), which turns a map of {rows} x {columns} patches "
            "(height x width); PIL's `size` is (width, height): pass the image itself",
            stacklevel=3,
        )
    return int(height), int(width)


def _resize(array: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    from torch import from_numpy
    from torch.nn.functional import interpolate

    _check(mode in ("bilinear", "nearest"), "interpolation", "bilinear or nearest", repr(mode))
    _check(len(size) == 2 and min(size) > 0, "size", "(H, W), both at least 1", size)
    return interpolate(from_numpy(array)[None, None], size=tuple(size), mode=mode)[0, 0].numpy()


def _rgb(image: Picture, tile: int | None = None) -> Image.Image:
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        good = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size > 0
        _check(good, "image", "a PIL.Image or uint8 [H, W, 3]", f"{array.dtype} {list(array.shape)}")
        image = Image.fromarray(array)
    _check(tile is None or tile > 0, "tile", "at least 1", tile)
    image = image.convert("RGB")
    return image if tile is None else ImageOps.contain(image, (tile, tile), Image.Resampling.LANCZOS)


def _columns(count: int, least: int = 1) -> int:
    """The fewest columns, from the square root and `least` on, that fill every row; if none do, those."""
    root = max(math.ceil(math.sqrt(count)), least)
    return next((columns for columns in range(root, 2 * root + 1) if count % columns == 0), root)


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Lines of whole words that fit; a word that doesn't is broken anywhere."""
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
        # The middle goes, because the names of neighbouring layers differ near their end.
        return f"{title[: (count + 1) // 2].rstrip()}…{title[len(title) - count // 2 :].lstrip()}"

    too_many = bisect_left(range(len(title)), True, key=lambda count: not fits(keep(count)))
    return keep(max(0, too_many - 1))
