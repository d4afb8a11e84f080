"""A loaded model and the preprocessing of its images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attnx.images import to_tensor
from attnx.models.checkpoint import first_line

if TYPE_CHECKING:
    from PIL import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and the preprocessing of its images.

    Attributes:
        size: (height, width) of the input in pixels.
        mean, std: 3 values each, for pixels in 0..1.
        interpolation: as in `attnx.images.to_tensor`.
        model_kwargs: further arguments of the model's forward.
        crop_pct, crop_mode: settings of timm's evaluation transform. `prepare` does not crop.
    """

    name: str
    model: nn.Module
    size: tuple[int, int]
    mean: Sequence[float] = IMAGENET[0]
    std: Sequence[float] = IMAGENET[1]
    interpolation: str = "bicubic"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def prepare(self, image: "Image.Image") -> Tensor:
        """RGB image -> [3, height, width] float32, the whole image resized and normalised."""
        return to_tensor(image, self.size, self.mean, self.std, self.interpolation)

    def fingerprint(self) -> str:
        """SHA-256 of the names, dtypes, shapes and bytes of the weights, sorted by name."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def height_and_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """An image size as (height, width). One number gives a square, and None gives None.

    Raises:
        ValueError: the size is neither a positive int nor a pair of positive ints.
    """
    if size is None:
        return None
    pair: Sequence[object] = size if isinstance(size, (tuple, list)) else (size, size)
    whole = [int(n) for n in pair if isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0]
    if len(pair) != 2 or len(whole) != 2:
        raise ValueError(f"image size: expected a positive int, or (height, width) of two; got {size!r}")
    return whole[0], whole[1]


def no_download(name: str, error: Exception) -> ConnectionError:
    """The error for weights of `name` that could not be downloaded. Its message lists alternatives."""
    return ConnectionError(
        f"the weights of {name} could not be downloaded ({first_line(error)}); pass --checkpoint FILE with weights "
        "you have, --no-pretrained for random ones, or --model demo"
    )
