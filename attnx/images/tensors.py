"""Convert pictures to normalised tensors at the size of a model's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

_INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def to_tensor(
    image: Image.Image,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
) -> torch.Tensor:
    """The whole image at the size of a model's input, `(pixels / 255 - mean) / std`.

    It is resized with antialiasing to exactly `size`, and not cropped, so that maps cover the whole picture. The aspect
    ratio changes if `size` has another one.

    Args:
        image: mode RGB, any size.
        size: (h, w) in pixels.
        mean, std: 3 values each, for pixels in 0..1; std positive.
        interpolation: "nearest" | "box" | "bilinear" | "hamming" | "bicubic" | "lanczos", as Pillow's.

    Returns:
        [3, h, w] float32, contiguous, on the CPU.

    Raises:
        ValueError: a wrong argument.
    """
    import torch

    if image.mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {image.mode}; read_image gives RGB")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (h, w), each at least 1, got {size}")
    if len(mean) != 3:
        raise ValueError(f"mean: expected 3 values, got {mean}")
    if len(std) != 3 or min(std) <= 0:
        raise ValueError(f"std: expected 3 positive values, got {std}")
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {_INTERPOLATIONS}, got {interpolation!r}")
    height, width = size
    resized = image.resize((width, height), Image.Resampling[interpolation.upper()])
    # [h, w, 3] -> [3, h, w]; numpy keeps to one thread: torch would start its pool in every decoding thread.
    pixels = np.asarray(resized).transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
    pixels -= np.asarray(mean, dtype=np.float32)[:, None, None]
    pixels /= np.asarray(std, dtype=np.float32)[:, None, None]
    return torch.from_numpy(pixels)
