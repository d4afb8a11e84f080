"""A loaded model and the preprocessing of its images."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attnx.images import read_image, to_rgb, to_tensor
from attnx.models.checkpoint import first_line
from attnx.models.pixels import Crop, Pixels

if TYPE_CHECKING:
    from PIL import Image

    Picture = Image.Image | str | Path

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """A model in eval mode and the preprocessing of its images.

    Attributes:
        size: (height, width) of the input in pixels.
        mean, std: 3 values each, for pixels in 0..1.
        interpolation: as in `attnx.images.to_tensor`.
        model_kwargs: further arguments of the model's forward.
        crop_pct, crop_mode: settings of timm's evaluation transform.

    Example:
        >>> from PIL import Image
        >>> loaded, image = attnx.load("demo"), Image.new("RGB", (160, 120))
        >>> images = loaded.prepare([image, image])
        >>> loaded, images.shape, loaded.model(images, **loaded.model_kwargs).shape
        (Loaded('demo', VisionTransformer, 96x96), torch.Size([2, 3, 96, 96]), torch.Size([2, 16]))
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

    def __repr__(self) -> str:
        return f"Loaded({self.name!r}, {type(self.model).__name__}, {self.size[0]}x{self.size[1]})"

    @property
    def library(self) -> str:
        """The part of the name before the colon; "" without one."""
        return self.name.partition(":")[0] if ":" in self.name else ""

    def pixels(self, kind: str = "whole") -> Pixels:
        """The preprocessing of a kind: "whole", "timm" or "processor", see `attnx.models.pixels.Pixels`."""
        library, _, name = self.name.partition(":")
        return Pixels(
            kind, (int(self.size[0]), int(self.size[1])), tuple(map(float, self.mean)), tuple(map(float, self.std)),
            self.interpolation, self.crop_pct, self.crop_mode, name if library == "hf" else None,
        )  # fmt: skip

    def prepare(self, image: "Picture | Sequence[Picture]", pixels: str = "whole") -> Tensor:
        """The model's input of an image, resized and normalised, on the CPU.

        Args:
            image: a picture, or the path of one, of any size; or a list of them. A file is turned upright as its EXIF
                says; a PIL image is taken as it is (`ImageOps.exif_transpose` turns it).
            pixels: "whole": the whole picture, resized to `size`, so that maps cover all of it; its aspect ratio may
                change. "timm": timm's evaluation transform with the model's own settings, which crops. "processor": the
                image processor of an "hf:" model. `crop` gives the part of the picture that these show.

        Returns:
            [3, height, width] float32, or [B, 3, height, width] for a list.

        Raises:
            ImageError: a file can't be read.
            ValueError: an unknown kind, an empty list, or a processor that can't be loaded or gives another size.
        """
        if isinstance(image, Sequence) and not isinstance(image, str):
            if not image:
                raise ValueError("image: expected a picture, a path, or a list of at least one; got an empty list")
            return torch.stack([self.prepare(each, pixels) for each in image])
        picture = as_picture(image)
        if pixels == "whole":
            return to_tensor(picture, self.size, self.mean, self.std, self.interpolation)
        kind = self.pixels(pixels)
        return kind.normalise(torch.tensor(kind(picture)[0])[None])[0]

    def crop(self, image: "Picture", pixels: str = "whole") -> Crop:
        """The part of a picture that `prepare` shows the model: (left, top, right, bottom) in its pixels.

        A transform that pads may reach beyond the picture.

        Args:
            image, pixels: as in `prepare`.
        """
        return self.pixels(pixels)(as_picture(image))[1]

    def fingerprint(self) -> str:
        """SHA-256 of the names, dtypes, shapes and bytes of the weights, sorted by name."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def as_picture(image: "Picture") -> "Image.Image":
    """An RGB picture: that in the file at a path, turned upright as its EXIF says, or a PIL image as it is.

    Raises:
        ImageError: the file can't be read.
        ValueError: neither a PIL image nor a path.
    """
    from PIL.Image import Image

    if isinstance(image, (str, Path)):
        return read_image(image)
    if not isinstance(image, Image):
        raise ValueError(f"image: expected a PIL image or the path of one; got {type(image).__name__}")
    return image if image.mode == "RGB" else to_rgb(image.copy())


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
        f"the weights of {name} could not be downloaded ({first_line(error)}); pass checkpoint=FILE with weights you "
        "have, pretrained=False for random ones, or take the model 'demo'"
    )
