"""A loaded model, and how its images are prepared."""

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
    """A model in eval mode, and how its images are prepared. size: (height, width) in pixels.

    crop_pct, crop_mode: of timm's own evaluation transform; `prepare` takes the whole image.
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
        """SHA-256 of the weights: of names, dtypes, shapes and bytes, in the order of names."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def height_and_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of an image size: of one number, a square; None of None.

    Raises:
        ValueError: it is neither a positive int nor a pair of them.
    """
    if size is None:
        return None
    pair: Sequence[object] = size if isinstance(size, (tuple, list)) else (size, size)
    whole = [int(n) for n in pair if isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0]
    if len(pair) != 2 or len(whole) != 2:
        raise ValueError(f"image size: expected a positive int, or (height, width) of two; got {size!r}")
    return whole[0], whole[1]


def no_download(name: str, error: Exception) -> ConnectionError:
    """The error to raise where weights of `name` could not be downloaded; it says what to pass instead."""
    return ConnectionError(
        f"the weights of {name} could not be downloaded ({first_line(error)}); pass --checkpoint FILE with weights "
        "you have, --no-pretrained for random ones, or --model demo"
    )
