"""The image towers of open_clip: "open_clip:NAME" or "open_clip:NAME/PRETRAINED"."""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from attnx.messages import printable
from attnx.models.checkpoint import check_values, first_line, misfit, read_weights
from attnx.models.loaded import Loaded, height_and_width, no_download

_PREPARATION = ("mean", "std", "interpolation", "resize_mode")
# timm's crop_mode for open_clip's resize_mode.
_CROPS = {"shortest": "center", "squash": "squash"}


def load_open_clip(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> Loaded:
    """The `visual` part of `open_clip.create_model`, with the preprocessing of the model and its weights.

    QuickGELU is used if the weights were trained with it.

    Args:
        name: NAME or NAME/PRETRAINED, as in `open_clip.list_pretrained()`. PRETRAINED sets the preprocessing also
            with pretrained=False.
        pretrained: download the weights PRETRAINED; False: random weights.
        image_size: (height, width) in pixels; None: the model's own.

    Raises:
        ValueError: an unknown name, no PRETRAINED, or an image size that the model can't have.
        NotImplementedError: the weights need images with padding.
        ConnectionError: the weights, or the configuration of the text part, could not be downloaded.
    """
    from open_clip import create_model, get_pretrained_cfg, list_pretrained_tags_by_model

    base, tag = _parts(name)
    if pretrained and not tag:
        tags = ", ".join(list_pretrained_tags_by_model(base)) or "none"
        raise ValueError(
            f"model: expected open_clip:{base}/PRETRAINED, with PRETRAINED one of {tags}; checkpoint=FILE or "
            f"pretrained=False; got open_clip:{name}"
        )
    config = dict(get_pretrained_cfg(base, tag)) if tag else {}
    try:
        with _quiet():
            clip = create_model(
                base, pretrained=tag if pretrained else None, pretrained_text=False, force_image_size=image_size,
                force_quick_gelu=bool(config.get("quick_gelu")),
                force_preprocess_cfg={key: config[key] for key in _PREPARATION if key in config},
            )  # fmt: skip
    except Exception as error:
        if pretrained or isinstance(error, OSError):
            raise no_download(f"open_clip:{name}", error) from error
        raise ValueError(f"model: open_clip can't build {base}: {first_line(error)}") from error
    return _prepared(f"open_clip:{name}", clip.visual, image_size)


def _parts(name: str) -> tuple[str, str]:
    """(NAME, PRETRAINED) of a name, as open_clip spells them; PRETRAINED may be "".

    Raises:
        ValueError: open_clip has no such model, or no such weights of it.
    """
    from open_clip import list_models, list_pretrained_tags_by_model

    models = list_models()
    if (whole := name.replace("/", "-")) in models:
        return whole, ""
    base, slash, tag = name.rpartition("/")
    base = base.replace("/", "-")
    if not slash or base not in models:
        close = difflib.get_close_matches(base or name, models, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see open_clip.list_models()"
        raise ValueError(f"model: open_clip has no model {printable(name, 150)!r}{hint}")
    tags = list_pretrained_tags_by_model(base)
    found = tag.lower().replace("-", "_")
    if found not in tags:
        expected = f"one of {', '.join(tags)}" if tags else "no PRETRAINED, as it has none"
        raise ValueError(f"model: open_clip:{base}: expected {expected}; got {printable(tag, 80)!r}")
    return base, found


def _prepared(name: str, visual: nn.Module, image_size: tuple[int, int] | None) -> Loaded:
    """The tower with the preprocessing that open_clip stores in it."""
    config: Any = visual.preprocess_cfg
    if config["resize_mode"] not in _CROPS:
        raise NotImplementedError(
            f"pixels: {name} pads its images (resize_mode {config['resize_mode']}); expected {' or '.join(_CROPS)}"
        )
    size = image_size or height_and_width(config["size"]) or (224, 224)
    return Loaded(
        name, visual, size, tuple(config["mean"]), tuple(config["std"]),
        "bilinear" if config["interpolation"] == "bilinear" else "bicubic", crop_mode=_CROPS[config["resize_mode"]],
    )  # fmt: skip


def load_visual(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights of the image tower, or of a whole model with keys `visual.*`.

    Position embeddings are interpolated to the size of the tower.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of weights, or keys, shapes or values that don't fit.
    """
    from open_clip.model import resize_pos_embed

    weights = read_weights(path)
    inner = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
    state = {f"visual.{key}": value for key, value in (inner or weights).items()}
    own: dict[str, Tensor] = model.state_dict()
    where = f"checkpoint {printable(path, None)}"
    try:
        with _quiet():
            resize_pos_embed(state, SimpleNamespace(visual=model))
    except Exception as error:
        raise ValueError(f"{where}: open_clip can't resize its positions: {first_line(error)}") from error
    fitting = {key.removeprefix("visual."): value for key, value in state.items()}
    message = misfit(fitting, own)
    if message:
        raise ValueError(f"{where} doesn't fit {type(model).__name__}: {message}")
    check_values(fitting, own, path)
    model.load_state_dict(fitting)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which logs to the root logger and would set that up."""
    root, handler = logging.getLogger(), logging.NullHandler()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
