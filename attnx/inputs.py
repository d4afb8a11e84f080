"""A model's call with nothing but images, and what it says where it wants more."""

from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from attnx.layout import patch_convolutions


def call_with_images(model: nn.Module, images: Tensor, kwargs: dict[str, Any]) -> Any:
    """What the model gives for images [B, channels, height, width] and other arguments.

    Raises:
        ValueError: the model takes a text too, and none was given; names the part of it that takes images alone.
    """
    takes = _takes(model)
    first = next(iter(takes), "")
    if "pixel_values" not in takes or first == "pixel_values":
        return model(images, **kwargs)
    if first == "input_ids" and first not in kwargs:
        towers = [name for name, child in model.named_children() if patch_convolutions(child)]
        way = f"pass its part for images (model.{towers[0]}), or" if towers else "pass"
        raise ValueError(
            f"model: expected one that takes images alone; {type(model).__name__} takes {first} and pixel_values; "
            f"{way} model_kwargs={{{first!r}: ...}}"
        )
    return model(pixel_values=images, **kwargs)


def _takes(model: nn.Module) -> dict[str, Parameter]:
    """The parameters of the model's forward."""
    try:
        return dict(signature(model.forward).parameters)
    except (TypeError, ValueError):
        return {}
