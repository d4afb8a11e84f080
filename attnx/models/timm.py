"""Models of timm: "timm:NAME"."""

import difflib
from typing import Any

from torch import nn

from attnx.messages import printable
from attnx.models.checkpoint import first_line
from attnx.models.loaded import Loaded, no_download


def load_timm(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    """The model of `timm.create_model(name)`; errors as in `load_model`."""
    import timm

    base = name.partition(".")[0]
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see timm.list_models()"
        raise ValueError(f"model: timm has no model {name!r}{hint}")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if isinstance(error, TypeError) and image_size is not None:
            message = first_line(error)
            raise ValueError(f"image size: timm:{name} has a fixed one; got {image_size} ({message})") from error
        if not pretrained or name.startswith("local-dir:"):
            raise ValueError(f"model: timm can't load {printable(name, 150)}: {first_line(error)}") from error
        raise no_download(f"timm:{name}", error) from error
    return with_timm_config(f"timm:{name}", model, image_size)


def with_timm_config(name: str, model: nn.Module, image_size: tuple[int, int] | None) -> Loaded:
    """A timm model with the preprocessing of its pretrained_cfg."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    size = image_size or tuple(config["input_size"][1:])
    return Loaded(
        name, model, size, config["mean"], config["std"], config["interpolation"],
        crop_pct=config["crop_pct"], crop_mode=config["crop_mode"],
    )  # fmt: skip
