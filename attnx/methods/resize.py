"""Maps at the size of their picture."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Maps = TypeVar("Maps", Tensor, np.ndarray)

MODES = ("bilinear", "nearest")
NORMALIZE = (None, "max", "sum", "minmax")


def resize(
    maps: Maps,
    size: tuple[int, int],
    crop: Sequence[float] | None = None,
    normalize: str | None = None,
    mode: str = "bilinear",
) -> Maps:
    """Maps at the size of the picture: a value for each pixel. Pixels outside the crop are zero.

    The map is read at the centre of each pixel, as `torch.nn.functional.interpolate` reads it in the modes "bilinear"
    (align_corners=False) and "nearest-exact". A pixel is inside the crop if its centre is.

    Args:
        maps: [..., h, w], a tensor or numpy array of any real dtype; computed in float32.
        size: (height, width) of the picture in pixels. PIL's `image.size` is (width, height).
        crop: the part of the picture that the maps cover, (left, top, right, bottom) in pixels, such as `row.crop` of a
            job; None: the whole picture. It may reach beyond the picture, where a model pads it.
        normalize: of each map after resizing. None: the values stay. "max": divided by the maximum. "sum": divided by
            the sum, so that the pixels sum to 1. Both set negative values to 0, and a map without mass stays 0.
            "minmax": stretched to 0..1 inside the crop; a constant map becomes 0.
        mode: "bilinear" or "nearest".

    Returns:
        [..., height, width] float32, of the type and on the device of `maps`.

    Raises:
        ValueError: invalid maps, size, crop, normalize or mode.

    Example:
        >>> import torch, attnx
        >>> attnx.resize(torch.tensor([[1.0, 3.0]]), (2, 4), crop=(0, 0, 4, 1), mode="nearest")
        tensor([[1., 1., 3., 3.],
                [0., 0., 0., 0.]])
    """
    values = _tensor(maps)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: expected None, 'max', 'sum' or 'minmax'; got {normalize!r}")
    height, width = _size(size)
    left, top, right, bottom = (0.0, 0.0, float(width), float(height)) if crop is None else _crop(crop)
    flat = values.reshape(-1, *values.shape[-2:]).float()
    rows, down = _places(height, top, bottom, flat.shape[1])
    columns, across = _places(width, left, right, flat.shape[2])
    seen = _read(_read(flat, across, 2, mode), down, 1, mode)
    if normalize is not None and seen.numel():
        seen = _normalized(seen, normalize)
    resized = flat.new_zeros(len(flat), height, width)
    resized[:, rows, columns] = seen
    result = resized.view(*values.shape[:-2], height, width)
    return result.numpy() if isinstance(maps, np.ndarray) else result


def _tensor(maps: Tensor | np.ndarray) -> Tensor:
    """The maps as a tensor. Raise ValueError unless they are real, with at least two dimensions, and not empty."""
    if isinstance(maps, np.ndarray) and maps.dtype.kind in "fiub" and maps.ndim >= 2 and maps.size:
        # A copy: torch takes neither every byte order nor every width, and warns about read-only memory.
        return torch.from_numpy(np.array(maps, np.float32, order="C"))
    if isinstance(maps, Tensor) and maps.dim() >= 2 and maps.numel() and not maps.is_complex():
        return maps
    got = f"{maps.dtype} {list(maps.shape)}" if isinstance(maps, (Tensor, np.ndarray)) else type(maps).__name__
    raise ValueError(f"maps: expected a real tensor or array [..., h, w], not empty; got {got}")


def _size(size: Sequence[int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, Sequence) else ()
    whole = [int(n) for n in pair if isinstance(n, (int, np.integer)) and n > 0]
    if len(pair) != 2 or len(whole) != 2:
        raise ValueError(f"size: expected (height, width) in pixels, both at least 1; got {size!r}")
    return whole[0], whole[1]


def _crop(crop: Sequence[float]) -> tuple[float, float, float, float]:
    try:
        box = tuple(map(float, crop))
    except (TypeError, ValueError):
        box = ()
    if len(box) != 4 or not all(map(np.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"crop: expected (left, top, right, bottom) with left < right and top < bottom; got {crop!r}")
    return box[0], box[1], box[2], box[3]


def _places(length: int, start: float, stop: float, cells: int) -> tuple[slice, np.ndarray]:
    """Along one side of a picture: the pixels with their centre in the crop, and the place of each in map cells."""
    middles = np.arange(length) + 0.5
    pixels = np.flatnonzero((middles >= start) & (middles < stop))
    inside = slice(int(pixels[0]), int(pixels[-1]) + 1) if len(pixels) else slice(0, 0)
    return inside, (middles[inside] - start) / (stop - start) * cells


def _read(maps: Tensor, places: np.ndarray, axis: int, mode: str) -> Tensor:
    """Maps [B, h, w] read at places along an axis; the middle of the first cell is at 0.5."""
    most, device = maps.shape[axis] - 1, maps.device
    if mode == "nearest":
        cells = np.floor(places).clip(0, most).astype(np.int64)
        return maps.index_select(axis, torch.from_numpy(cells).to(device))
    at = (places - 0.5).clip(0, most)
    low = np.floor(at).astype(np.int64)
    share = torch.from_numpy((at - low).astype(np.float32)).to(device)
    first, second = (
        maps.index_select(axis, torch.from_numpy(cells).to(device)) for cells in (low, np.minimum(low + 1, most))
    )
    return torch.lerp(first, second, share[:, None] if axis == 1 else share)


def _normalized(maps: Tensor, how: str) -> Tensor:
    """Maps [B, h, w], each normalised; a map without a range or mass becomes 0, and one with NaN stays NaN."""
    if how == "minmax":
        low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
        # Resizing a constant map gives rounding noise, which stretching would amplify.
        noise = 8 * torch.finfo(torch.float32).eps * maps.abs().amax((-2, -1), keepdim=True)
        return torch.where(high - low <= noise, 0.0, (maps - low) / (high - low))
    positive = maps.clamp(min=0)
    whole = positive.amax((-2, -1), keepdim=True) if how == "max" else positive.sum((-2, -1), keepdim=True)
    return torch.where(whole == 0, 0.0, positive / whole)
