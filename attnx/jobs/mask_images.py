"""The mask of a photo from its map."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from attnx.jobs.columns import MapRow
from attnx.jobs.masks import places_in
from attnx.jobs.summary import spatial
from attnx.limits import PICTURE_PIXELS
from attnx.methods import mass_mask

__all__ = ["mask_image"]


def mask_image(row: MapRow, kind: str, mass: float) -> Image.Image:
    """The mask of a row's photo, 8-bit grey, of the photo's size; 0 outside the row's crop.

    The mean over the layers and heads of the map is taken first.

    Args:
        row: a row with a map [..., h, w].
        kind: "heat": the map, resized bilinearly into the crop, 255 at its maximum; "mass": 255 in the patches of
            `attnx.mass_mask`, upsampled by nearest neighbour.
        mass: share of the map's mass in a mask of kind "mass".

    Raises:
        ValueError: the row has no map over patches, no size or no crop, or too many pixels.
    """
    amap = spatial(row)
    if amap is None or row.crop is None or row.width is None or row.height is None:
        raise ValueError("expected a map over patches, with width, height and crop")
    if row.width * row.height > PICTURE_PIXELS:
        raise ValueError(f"expected a photo of at most {PICTURE_PIXELS:,} pixels; got {row.width} x {row.height}")
    left, top, right, bottom = row.crop
    rows, down = places_in(row.height, top, bottom, amap.shape[0])
    columns, across = places_in(row.width, left, right, amap.shape[1])
    if kind == "mass":
        inside = mass_mask(torch.from_numpy(amap), mass).numpy()
        values = inside[np.ix_(_cell(down, amap.shape[0]), _cell(across, amap.shape[1]))] * np.uint8(255)
    else:
        values = _heat(amap, down, across)
    full = np.zeros((row.height, row.width), np.uint8)
    # The pixels inside the crop are neighbours.
    if len(rows) and len(columns):
        full[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = values
    return Image.fromarray(full)


def _heat(amap: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """A map, interpolated at places in cells along its two sides; 255 is its maximum."""
    highest = amap.max()
    if not highest > 0:
        return np.zeros((len(down), len(across)), np.uint8)
    scaled = amap.clip(0) / highest * np.float32(255)
    wide = _lerp(scaled, across, axis=1)
    # In strips, so that a large photo takes little more memory than its mask.
    strips = [_lerp(wide, down[i : i + 256], axis=0).round().astype(np.uint8) for i in range(0, len(down), 256)]
    return np.concatenate([np.zeros((0, len(across)), np.uint8), *strips])


def _lerp(values: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along an axis; place 0.5 is the middle of the first value, beyond which it is constant."""
    at = (places - 0.5).clip(0, values.shape[axis] - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    part = (at - low).astype(np.float32)
    part = part[:, None] if axis == 0 else part
    found: np.ndarray = values.take(low, axis) * (1 - part) + values.take(high, axis) * part
    return found


def _cell(places: np.ndarray, cells: int) -> np.ndarray:
    found: np.ndarray = np.floor(places).astype(np.int64).clip(0, cells - 1)
    return found
