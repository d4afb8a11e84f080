"""Pictures of one image for `attnx show`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnx.extract.extractor import Extractor
from attnx.figures.picture import mask_contour, overlay, save
from attnx.figures.sheets import contact_sheet, heads_grid, layers_figure
from attnx.methods import cls_map, layer_maps, mass_mask
from attnx.trace.capture import capture
from attnx.trace.layers import Layers

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

    For a model without a class token, only overlay.png of the rollout is written, and its description says so.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = loaded.prepare(picture)[None].to(device)
    kwargs = loaded.model_kwargs
    colours: dict[str, Any] = {"colormap": style.colormap, "alpha": style.alpha}
    written: dict[Path, str] = {}

    def write(name: str, image: "Image", what: str) -> None:
        save(image, out / name)
        written[out / name] = what

    if method == "rollout":
        amap = Extractor(loaded.model, "rollout", layers=layers, heads=heads, model_kwargs=kwargs, **rolling)(images)[0]
        rolled, what = amap, "rollout"
    else:
        fused = "mean" if heads == "each" else heads
        extractor = Extractor(loaded.model, method, layers=layers, heads=fused, model_kwargs=kwargs)
        amap = extractor(images)[0]
        what = "class token's map" if amap.dim() == 2 else "class token's map, mean over layers"
        amap = amap if amap.dim() == 2 else amap.mean(0)
        rolled = None
    write("overlay.png", overlay(picture, amap, interpolation=style.interpolation, **colours), what)
    try:
        per_layer, each = _class_token(loaded, images, layers, "mean" if heads == "each" else heads)
    except ValueError as error:
        written[out / "overlay.png"] += f" (no heads.png, masks.png and layers.png: {error})"
        return written
    if rolled is None:
        rolled = Extractor(loaded.model, "rollout", model_kwargs=kwargs, **rolling)(images)[0]
    write("heads.png", heads_grid(picture, each, **colours), f"class token's map in {per_layer.names[-1]}, by head")
    masks = [mask_contour(picture, mask) for mask in mass_mask(each, style.keep)]
    titles = [f"head {i}" for i in range(len(masks))]
    sheet = contact_sheet(masks, titles, columns=min(4, len(masks)), tile=256)
    write("masks.png", sheet, f"patches that hold {style.keep:.0%} of each head's mass")
    figure = layers_figure(
        picture, per_layer.names, per_layer.maps[0], rolled, interpolation=style.interpolation, **colours
    )
    write("layers.png", figure, "class token's map in every layer; max, min, mean over layers; rollout")
    return written


def _class_token(loaded: "Loaded", images: Tensor, layers: Layers, heads: str) -> tuple[Any, Tensor]:
    """The class token's maps in all layers (`LayerMaps`), and in each head of the last one, [H, h, w]."""
    with torch.inference_mode(), capture(loaded.model, layers=layers, heads="each", rows=[0]) as trace:
        loaded.model(images, **loaded.model_kwargs)
    with torch.inference_mode():
        return layer_maps(trace, heads), cls_map(trace)[0]
