"""The arguments of `Extractor`, and calls of a model with images only."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from attnx.ops.checks import integer
from attnx.trace.grids import patch_convolutions
from attnx.trace.layers import check_model

METHODS = ("rollout", "cls", "layers", "token")
_OPTIONS = {"rollout": ("residual", "discard", "start", "preset", "query", "rows"), "token": ("token",)}


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


def check_arguments(
    model: nn.Module, method: str, heads: str, dtype: torch.dtype | None, compile: bool | str, options: dict[str, Any]
) -> None:
    """Raise ValueError unless these are arguments of `Extractor`."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    known = _OPTIONS.get(method, ())
    if not set(options) <= set(known):
        raise ValueError(
            f"options of method {method!r}: expected {', '.join(known) or 'none'}; got {', '.join(options)}"
        )
    check_model(model)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch.dtype; got {dtype!r}")
    if heads == "each" and method not in ("cls", "token"):
        raise ValueError(f"heads='each' is for methods 'cls' and 'token'; got method {method!r}")
    if method == "token" and integer(options.get("token")) is None:
        raise ValueError(f"token: expected the index of a token for method 'token'; got {options.get('token')!r}")
    if model.training:
        raise ValueError("model: expected eval mode; got training mode; call model.eval()")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if compile not in (False, True, "auto"):
        raise ValueError(f"compile: expected False, True or 'auto'; got {compile!r}")
    if compile is True and device.type != "cuda":
        raise ValueError(f"compile: expected a model on a CUDA device; got {device}")
