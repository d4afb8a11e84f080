"""Models of torchvision: "torchvision:NAME"."""

import difflib
import math
from typing import Any

from torch import Tensor, nn

from attnx.models.checkpoint import first_line
from attnx.models.loaded import Loaded, no_download

# The argument that sets the input's size, by the module of the model. Other models take any size.
_SIZES = {"vision_transformer": "image_size", "maxvit": "input_size"}


def load_torchvision(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    """The model of `torchvision.models.get_model(name)`, with the preprocessing of its default weights.

    Raises:
        ValueError: an unknown name, or an image size that the model can't have.
        NotImplementedError: a model that is not for classification of images.
        ConnectionError: the weights could not be downloaded.
    """
    from torchvision.models import get_model_weights

    _check_name(name)
    weights = get_model_weights(name)["DEFAULT"]
    transform = weights.transforms()
    own = int(transform.crop_size[0])
    size = image_size or (own, own)
    model = _build(name, size, image_size is not None)
    if pretrained:
        try:
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:
            raise no_download(f"torchvision:{name}", error) from error
        model.load_state_dict(_resized(model, state, size))
    return Loaded(
        f"torchvision:{name}", model, size, tuple(transform.mean), tuple(transform.std), transform.interpolation.value,
        crop_pct=crop_share(own, int(transform.resize_size[0])),
    )  # fmt: skip


def crop_share(crop: int, resize: int) -> float:
    """The share crop / resize, rounded so that floor(crop / share) is `resize`.

    Example:
        >>> crop_share(224, 256)
        0.875
    """
    share = crop / resize
    return share if math.floor(crop / share) == resize else math.nextafter(share, 0.0)


def _check_name(name: str) -> None:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name in known:
        return
    if name in torchvision.models.list_models():
        raise NotImplementedError(f"model: torchvision:{name} is not for classification of images, as expected")
    close = difflib.get_close_matches(name, known, 3)
    hint = f"; did you mean {', '.join(close)}?" if close else "; see torchvision.models.list_models()"
    raise ValueError(f"model: torchvision has no model {name!r}{hint}")


def _build(name: str, size: tuple[int, int], wanted: bool) -> nn.Module:
    """The model with random weights for images of `size`. wanted: the caller chose the size."""
    from torchvision.models import get_model, get_model_builder

    module = get_model_builder(name).__module__.rpartition(".")[2]
    options: dict[str, Any] = {}
    if module == "vision_transformer":
        if size[0] != size[1]:
            raise ValueError(f"image size: torchvision:{name} takes squares; got {size[0]}x{size[1]}")
        options = {_SIZES[module]: size[0]}
    elif module in _SIZES:
        options = {_SIZES[module]: size}
    try:
        model: nn.Module = get_model(name, weights=None, **options)
    except Exception as error:
        if wanted and options:
            got = f"{size[0]}x{size[1]}"
            raise ValueError(f"image size: torchvision:{name} can't have {got}: {first_line(error)}") from error
        raise ValueError(f"model: torchvision can't build {name}: {first_line(error)}") from error
    return model


def _resized(model: nn.Module, state: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """The weights, with a ViT's position embeddings interpolated to the size."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(model, VisionTransformer):
        return state
    resized: dict[str, Tensor] = interpolate_embeddings(size[0], model.patch_size, state)
    return resized
