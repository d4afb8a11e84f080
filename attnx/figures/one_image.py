"""Pictures of one image for `attnx show`."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnx.extract.extractor import Extractor
from attnx.figures.picture import mask_contour, overlay, save
from attnx.figures.sheets import contact_sheet, heads_grid, layers_figure
from attnx.messages import one_line
from attnx.methods import LayerMaps, cls_map, layer_maps, mass_mask, rollout
from attnx.methods.maps import cls_layer
from attnx.methods.received import last_on_grid, received
from attnx.trace.capture import capture
from attnx.trace.layers import Layers
from attnx.trace.trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Loaded


@dataclass(frozen=True)
class Style:
    """Options of the pictures.

    Attributes:
        colormap: a name in `matplotlib.colormaps`.
        alpha: opacity of the colours, 0 to 1.
        interpolation: "bilinear" or "nearest".
        keep: share of each map's mass inside its mask, see `attnx.mass_mask`.
    """

    colormap: str = "turbo"
    alpha: float = 0.5
    interpolation: str = "bilinear"
    keep: float = 0.6


def draw(
    picture: "Image",
    loaded: "Loaded",
    out: Path,
    method: str,
    layers: Layers,
    heads: str,
    rolling: dict[str, Any],
    style: Style,
    device: torch.device,
) -> dict[Path, str]:
    """Write overlay.png, heads.png, masks.png and layers.png to `out`; {path: description} of the written files.

    A model without a rollout gets the class token's map as overlay.png, or, without a class token, received.png: the
    attention that each patch receives in the last layer over a known grid. If there is no such layer, matrix.png has
    the last layer's map, queries by keys. The descriptions give the reasons.

    Raises:
        ValueError: the method has no map and is not rollout with default options.
    """
    images = loaded.prepare(picture)[None].to(device)
    colours: dict[str, Any] = {"colormap": style.colormap, "alpha": style.alpha}
    written: dict[Path, str] = {}

    def write(name: str, image: "Image", what: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        save(image, out / name)
        written[out / name] = what

    def over(amap: Tensor) -> "Image":
        return overlay(picture, amap, interpolation=style.interpolation, **colours)

    fused = "mean" if heads == "each" else heads
    rolled: Tensor | None = None
    name = "overlay.png"
    if method == "rollout":
        rolled, why = _rolled(loaded, images, rolling, layers=layers, heads=heads)
        if rolled is not None:
            image, what = over(rolled), "rollout"
        else:
            image, name, what = _without_rollout(loaded, images, layers, fused, over, style.colormap)
            what += f"; no rollout: {why}"
    else:
        amap = Extractor(loaded.model, method, layers=layers, heads=fused, model_kwargs=loaded.model_kwargs)(images)[0]
        what = "class token's map" if amap.dim() == 2 else "class token's map, mean over layers"
        image = over(amap if amap.dim() == 2 else amap.mean(0))
    write(name, image, what)
    try:
        per_layer, each = _class_token(loaded, images, layers, fused)
    except ValueError as error:
        written[out / name] += f"; no heads.png, masks.png and layers.png: {error}"
        return written
    if method != "rollout":
        rolled, _ = _rolled(loaded, images, rolling)
    write("heads.png", heads_grid(picture, each, **colours), f"class token's map in {per_layer.names[-1]}, by head")
    masks = [mask_contour(picture, mask) for mask in mass_mask(each, style.keep)]
    titles = [f"head {i}" for i in range(len(masks))]
    sheet = contact_sheet(masks, titles, columns=min(4, len(masks)), tile=256)
    write("masks.png", sheet, f"patches that hold {style.keep:.0%} of each head's mass")
    figure = layers_figure(
        picture, per_layer.names, per_layer.maps[0], rolled, interpolation=style.interpolation, **colours
    )
    what = "class token's map in every layer; max, min, mean over layers"
    write("layers.png", figure, what if rolled is None else f"{what}; rollout")
    return written


def _rolled(loaded: "Loaded", images: Tensor, rolling: dict[str, Any], **options: Any) -> tuple[Tensor | None, str]:
    """(rollout [h, w], ""), or None and the reason that the model has none.

    Raises:
        ValueError: the rollout fails with other options than the defaults.
    """
    extractor = Extractor(loaded.model, "rollout", model_kwargs=loaded.model_kwargs, **options, **rolling)
    try:
        return extractor(images)[0], ""
    except ValueError as error:
        defaults = signature(rollout).parameters
        if any(value != defaults[name].default for name, value in rolling.items()):
            raise
        # The first part says what was expected; the rest lists layers.
        return None, one_line(str(error).removeprefix("layers: ").partition(";")[0], 160)


def _without_rollout(
    loaded: "Loaded", images: Tensor, layers: Layers, heads: str, over: Callable[[Tensor], "Image"], colormap: str
) -> tuple["Image", str, str]:
    """The picture of a model without a rollout, its name, and its description; `over` draws a map over the image."""
    with torch.inference_mode(), capture(loaded.model, layers=layers, heads=heads) as trace:
        loaded.model(images, **loaded.model_kwargs)
    with torch.inference_mode():
        with suppress(ValueError):
            return over(cls_map(trace)[0]), "overlay.png", f"class token's map in {cls_layer(trace)}"
        with suppress(ValueError):
            layer = last_on_grid(trace)
            what = f"how much each patch is attended to in {layer}, mean over its queries"
            return over(received(trace, layer)[0]), "received.png", what
        layer = list(trace)[-1]
        first = ", first window" * (trace.sides(layer)[1].kind == "windows")
        what = f"map of {layer}{first}: a row for each query, a column for each key; no layer is over a known grid"
        return _matrix(trace[layer][0], colormap), "matrix.png", what


def _matrix(amap: Tensor, colormap: str) -> "Image":
    """A map [M, N] as a picture, 768 pixels at its longer side."""
    from PIL import Image

    rows, columns = amap.shape
    height, width = (max(1, 768 * n // max(rows, columns)) for n in (rows, columns))
    canvas = Image.new("RGB", (width, height))
    return overlay(canvas, amap, interpolation="nearest", colormap=colormap, alpha=1)


def _class_token(loaded: "Loaded", images: Tensor, layers: Layers, heads: str) -> tuple[LayerMaps, Tensor]:
    """The class token's maps in all layers, and in each head of the last one, [H, h, w].

    Raises:
        ValueError: there is no class token, or not the same in all layers; one short sentence.
    """
    with torch.inference_mode(), capture(loaded.model, layers=layers, heads="each", rows=[0]) as trace:
        loaded.model(images, **loaded.model_kwargs)
    try:
        with torch.inference_mode():
            return layer_maps(trace, heads), cls_map(trace)[0]
    except ValueError as error:
        raise ValueError(_no_class_token(trace)) from error


def _no_class_token(trace: Trace) -> str:
    """The reason that the layers of a trace have no class token in common."""
    keys = [side for _, side in trace.all_sides().values()]
    if any(side.cls for side in keys):
        return "the layers attend to different tokens"
    windows = any(side.kind == "windows" for side in keys)
    return "the model attends in windows, without a class token" if windows else "the model has no class token"
