"""A model's call with nothing but images, and an error where it wants more."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from attnx.trace.layout import patch_convolutions


def image_call(model: nn.Module, kwargs: dict[str, Any]) -> Callable[[Tensor], Any]:
    """A function of images [B, channels, height, width] that calls the model with them and with other arguments.

    Raises:
        ValueError: the model takes a text too, and none was given; names the part of it that takes images alone.
    """
    try:
        takes = list(signature(model.forward).parameters)
    except (TypeError, ValueError):
        takes = []
    first = takes[0] if takes else ""
    if "pixel_values" not in takes or first == "pixel_values":
        return partial(model, **kwargs)
    if first == "input_ids" and first not in kwargs:
        towers = [name for name, child in model.named_children() if patch_convolutions(child)]
        way = f"pass its part for images (model.{towers[0]}), or" if towers else "pass"
        raise ValueError(
            f"model: expected one that takes images alone; {type(model).__name__} takes {first} and pixel_values; "
            f"{way} model_kwargs={{{first!r}: ...}}"
        )
    return lambda images: model(pixel_values=images, **kwargs)
