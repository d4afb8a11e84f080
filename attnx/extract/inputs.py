"""Calls of a model with images only, and an error if the model requires a text."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from attnx.trace.grids import patch_convolutions


def image_call(model: nn.Module, kwargs: dict[str, Any]) -> Callable[[Tensor], Any]:
    """A function of images [B, channels, height, width] that calls the model with them and with `kwargs`.

    Raises:
        ValueError: the model requires a text that is not in `kwargs`; the message names its image part.
    """
    try:
        parameters = list(signature(model.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    first = parameters[0] if parameters else ""
    if "pixel_values" not in parameters or first == "pixel_values":
        return partial(model, **kwargs)
    if first == "input_ids" and first not in kwargs:
        towers = [name for name, child in model.named_children() if patch_convolutions(child)]
        advice = f"pass its image part (model.{towers[0]}), or" if towers else "pass"
        raise ValueError(
            f"model: expected one that takes only images; {type(model).__name__} takes {first} and pixel_values; "
            f"{advice} model_kwargs={{{first!r}: ...}}"
        )
    return lambda images: model(pixel_values=images, **kwargs)


def check_images(images: object, videos: bool = False) -> None:
    """Raise ValueError unless images are a tensor [B, channels, height, width] with B >= 1.

    videos: a tensor with 5 dimensions is accepted, too.
    """
    if isinstance(images, Tensor) and images.dim() in ((4, 5) if videos else (4,)) and len(images):
        return
    got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
    one = "; pass images[None]" if isinstance(images, Tensor) and images.dim() == 3 else ""
    also = ", or one of videos with 5 dimensions," if videos else ""
    raise ValueError(f"images: expected a tensor [B, channels, height, width]{also} with B >= 1; got {got}{one}")
