"""Preprocessing: from a picture to the model's input, and the part of the picture that it shows.

There are three kinds, and a job records its kind: "timm", timm's evaluation transform, bit for bit; "whole", the whole
picture resized to the model's size; "processor", the model's image processor of Hugging Face.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

__all__ = ["Crop", "Pixels"]

Crop = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the upright picture


@dataclass(frozen=True)
class Pixels:
    """The preprocessing of a model. It can be pickled, and `describe` gives JSON.

    Args:
        kind: "timm", "whole" or "processor".
        size: (height, width) in pixels.
        mean, std: 3 values each, for pixels in 0..1.
        interpolation: Pillow's name in lower case.
        crop_pct, crop_mode: for "timm", as in its model configurations; crop_mode: "center", "squash" or "border".
        processor: for "processor", the argument of AutoImageProcessor.from_pretrained.
    """

    kind: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float = 1.0
    crop_mode: str = "center"
    processor: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("timm", "whole", "processor"):
            raise ValueError(f"pixels: expected timm, whole or processor; got {self.kind!r}")
        if self.kind == "processor" and self.processor is None:
            raise ValueError("pixels: processor is for hf: models that ship one")

    def __call__(self, picture: Image.Image, max_pixels: int | None = None) -> tuple[np.ndarray, Crop]:
        """RGB picture -> [3, height, width] uint8 ("processor": float32), and the part of the picture that it shows.

        Raises:
            ValueError: the resized picture would have more than max_pixels, because it is long and thin.
        """
        if self.kind == "processor":
            return self._processed(picture, max_pixels)
        height, width = self.size
        resized, (left, top) = self._place(*picture.size)
        _check_area(picture, resized, max_pixels)
        if resized != picture.size:
            picture_at_size = picture.resize(resized, Image.Resampling[self.interpolation.upper()])
        else:
            picture_at_size = picture
        if (left, top) != (0, 0) or resized != (width, height):
            fill = tuple(round(255 * m) for m in self.mean) if self.crop_mode == "border" else (0, 0, 0)
            canvas = Image.new("RGB", (width, height), fill)
            canvas.paste(picture_at_size, (-left, -top))
            picture_at_size = canvas
        # Scale factors from resized pixels to the picture's pixels.
        across, down = picture.width / resized[0], picture.height / resized[1]
        crop = (left * across, top * down, (left + width) * across, (top + height) * down)
        return np.asarray(picture_at_size).transpose(2, 0, 1), crop

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise [B, 3, height, width] on any device to float32, with the same operations as timm's transform."""
        import torch

        if self.kind == "processor":
            return pixels
        most, mean, std = _constants(self.mean, self.std, pixels.device)
        return pixels.to(torch.float32).div_(most).sub_(mean).div_(std)

    def check(self) -> None:
        """Load the processor, if there is one.

        Raises:
            ValueError: the processor can't be loaded.
        """
        if self.processor is not None and self.kind == "processor":
            _processor(self.processor)

    def describe(self) -> dict[str, Any]:
        """The fields that this kind uses, for JSON."""
        timm, processor = ("crop_pct", "crop_mode"), ("processor",)
        unused = {"timm": processor, "whole": timm + processor, "processor": ("mean", "std", "interpolation", *timm)}
        return {name: value for name, value in asdict(self).items() if name not in unused[self.kind]}

    def _place(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The resized (width, height) of a picture, and the (left, top) of the model's crop in it."""
        h, w = self.size
        if self.kind == "whole":
            return (w, h), (0, 0)
        to_h, to_w = (math.floor(side / self.crop_pct) for side in (h, w))
        if self.crop_mode == "squash":
            resized = (to_w, to_h)
        elif self.crop_mode != "border" and to_h == to_w:
            short, long = min(width, height), max(width, height)
            other = int(to_h * long / short)
            resized = (to_h, other) if width <= height else (other, to_h)
        else:
            ratios = height / to_h, width / to_w
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            resized = (round(width / ratio), round(height / ratio))
        return resized, (_offset(resized[0], w), _offset(resized[1], h))

    def _processed(self, picture: Image.Image, max_pixels: int | None) -> tuple[np.ndarray, Crop]:
        assert self.processor is not None
        processor = _processor(self.processor)
        (height, width), (left, top) = _processor_place(processor, picture.size, self.size)
        _check_area(picture, (width, height), max_pixels)
        pixels = np.asarray(processor(images=picture, return_tensors="np")["pixel_values"][0], np.float32)
        if pixels.shape != (3, *self.size):
            raise ValueError(
                f"pixels: {self.processor}'s image processor gives {list(pixels.shape)}; "
                f"the model takes {list(self.size)}"
            )
        across, down = picture.width / width, picture.height / height
        right, bottom = left + self.size[1], top + self.size[0]
        return pixels, (left * across, top * down, right * across, bottom * down)


def _check_area(picture: Image.Image, resized: tuple[int, int], max_pixels: int | None) -> None:
    if max_pixels is not None and resized[0] * resized[1] > max_pixels:
        got = f"{picture.width} x {picture.height}, which is {resized[0]} x {resized[1]} before it is cropped"
        raise ValueError(f"expected at most {max_pixels:,} pixels, got {got}")


@functools.lru_cache(maxsize=8)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], on: torch.device) -> tuple[torch.Tensor, ...]:
    """255, mean and std as tensors on a device. They are cached because their creation synchronises with the device.

    255 is a tensor because CUDA replaces a division by a Python number with a multiplication by its reciprocal.
    """
    import torch

    of_channels = (torch.tensor(values, device=on)[:, None, None] for values in (mean, std))
    return torch.tensor(255.0, device=on), *of_channels


def _processor_place(
    processor: Any, picture: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The resized (height, width) of a picture (width, height) in a Hugging Face processor, and the crop's (left, top).

    Raises:
        ValueError: the processor resizes in an unsupported way.
    """
    width, height = picture
    to = dict(getattr(processor, "size", None) or {}) if getattr(processor, "do_resize", False) else {}
    if "shortest_edge" in to and "longest_edge" not in to:
        short, long = sorted(picture)
        other = int(to["shortest_edge"] * long / short)
        resized = (to["shortest_edge"], other) if height <= width else (other, to["shortest_edge"])
    elif {"height", "width"} <= set(to):
        resized = int(to["height"]), int(to["width"])
    elif not to:
        resized = height, width
    else:
        raise ValueError(f"pixels: expected a processor that resizes to a shortest edge, or a size; got {to}")
    if getattr(processor, "do_center_crop", False):
        return resized, (int((resized[1] - size[1]) / 2), int((resized[0] - size[0]) / 2))
    return resized, (0, 0)


def _offset(length: int, wanted: int) -> int:
    """The start of a centre crop, rounded as in timm and torchvision; negative values are padding."""
    return round((length - wanted) / 2.0) if length >= wanted else -((wanted - length) // 2)


@functools.lru_cache(maxsize=1)
def _processor(name: str) -> Any:
    from attnx.models.huggingface import image_processor

    return image_processor(name)
