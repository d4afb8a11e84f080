"""The mask of a photo from its map."""

from __future__ import annotations

import numpy as np
from PIL import Image

from attnx.jobs.columns import MapRow
from attnx.jobs.summary import spatial
from attnx.limits import PICTURE_PIXELS
from attnx.methods import mass_mask, resize

__all__ = ["mask_image"]

_STRIP = 256  # rows of pixels


def mask_image(row: MapRow, kind: str, mass: float) -> Image.Image:
    """The mask of a row's photo, 8-bit grey, of the photo's size; 0 outside the row's crop.

    The mean over the layers and heads of the map is taken first.

    Args:
        row: a row with a map [..., h, w].
        kind: "heat": the map, resized bilinearly into the crop, its largest pixel 255; "mass": 255 in the patches of
            `attnx.mass_mask`, upsampled by nearest neighbour.
        mass: share of the map's mass in a mask of kind "mass".

    Raises:
        ValueError: the row has no map over patches, no size or no crop, too many pixels, or a map with NaN or inf.
    """
    amap = spatial(row)
    if amap is None or row.crop is None or row.width is None or row.height is None:
        raise ValueError("expected a map over patches, with width, height and crop")
    if row.width * row.height > PICTURE_PIXELS:
        raise ValueError(f"expected a photo of at most {PICTURE_PIXELS:,} pixels; got {row.width} x {row.height}")
    if not np.isfinite(amap).all():
        raise ValueError("expected a map of finite values; got NaN or inf")
    values, mode = (mass_mask(amap, mass).numpy(), "nearest") if kind == "mass" else (amap.clip(0), "bilinear")
    width, height, (left, top, right, bottom) = row.width, row.height, row.crop

    def strip(first: int) -> np.ndarray:
        size = min(_STRIP, height - first), width
        return resize(values, size, (left, top - first, right, bottom - first), mode=mode)

    # In strips, so that a large photo takes little more memory than its mask.
    starts = range(0, height, _STRIP)
    highest = max(float(strip(first).max()) for first in starts)
    full = np.zeros((height, width), np.uint8)
    for first in starts if highest > 0 else ():
        full[first : first + _STRIP] = (strip(first) * (255 / highest)).round()
    return Image.fromarray(full)
