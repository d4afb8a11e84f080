"""Pictures of one image for `attnx show`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnx.figures.found_token import Box, FoundToken
from attnx.figures.picture import marked, mask_contour, save, with_colorbar, write
from attnx.figures.sheets import contact_sheet, heads_grid, layers_figure
from attnx.figures.shown import Request, Shown, extractor_of, main_map, rolled_or_why
from attnx.figures.style import Style
from attnx.methods import LayerMaps, cls_map, layer_maps, mass_mask, token_map
from attnx.trace.capture import capture
from attnx.trace.trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Loaded


class TokenMaps(NamedTuple):
    """The maps of one token: in every layer, in each head of the last one [H, h, w], and what they are."""

    layers: LayerMaps
    heads: Tensor
    what: str


def draw(
    picture: "Image", loaded: "Loaded", out: Path, request: Request, style: Style, device: torch.device,
    formats: tuple[str, ...] = (), arrays: bool = False, shown: Shown | None = None,
) -> dict[Path, str]:  # fmt: skip
    """Write overlay.png, heads.png, masks.png and layers.png to `out`; {path: description} of the written files.

    A model without a rollout gets the class token's map as overlay.png, or, without a class token, received.png: the
    attention that each patch receives in the last layer over a known grid. If there is no such layer, matrix.png has
    the last layer's map, queries by keys. The descriptions give the reasons.

    Args:
        formats: "pdf" and "svg", in which heads and layers are written, too.
        arrays: write maps.npz, too.
        shown: the result of `main_map` for this picture; None: it is computed.

    Raises:
        ValueError: the method has no map and is not rollout with default options.
    """
    images = loaded.prepare(picture)[None].to(device)
    written: dict[Path, str] = {}
    stored: dict[str, Any] = {}
    if shown is None:
        shown = main_map(picture, loaded, images, request, extractor_of(loaded, request))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{shown.name}.png"
    written[path] = shown.what
    stored["map"] = shown.amap
    image, limits = shown.over(picture, style)
    save(with_colorbar(image, limits, style.cmap) if style.colorbar and limits else image, path)
    try:
        if shown.token is None:
            maps = _of_class_token(loaded, images, request)
        else:
            maps = _of_token(shown.token, loaded, images, request)
    except ValueError as error:
        written[path] += f"; no heads.png, masks.png and layers.png: {error}"
    else:
        rolled = shown.amap if shown.what == "rollout" else None
        if request.method not in ("rollout", "token"):
            whole = Request(rolling=request.rolling)
            extract = extractor_of(loaded, whole)
            assert extract is not None
            rolled, _ = rolled_or_why(extract, images, whole)
        stored |= {"heads": maps.heads, "layers": maps.layers.maps[0], "names": np.array(maps.layers.names)}
        stored |= {} if rolled is None else {"rollout": rolled}
        written |= _draw_sheets(picture, maps, rolled, shown.token.box if shown.token else None, out, style, formats)
    if arrays:
        _save_arrays(stored, out / "maps.npz")
        written[out / "maps.npz"] = f"the maps as float32 arrays: {', '.join(stored)}"
    return written


def _draw_sheets(
    picture: "Image", maps: TokenMaps, rolled: Tensor | None, box: Box | None, out: Path, style: Style,
    formats: tuple[str, ...],
) -> dict[Path, str]:  # fmt: skip
    """Write heads, masks and layers; {path: description}."""
    options: dict[str, Any] = {
        "cmap": style.cmap, "alpha": style.alpha, "tile": style.tile, "scale": style.scale, "colorbar": style.colorbar
    }  # fmt: skip
    names, each = maps.layers.names, maps.heads
    heads = heads_grid(picture, each, **options)
    layers = layers_figure(picture, names, maps.layers.maps[0], rolled, interpolation=style.interpolation, **options)
    what = f"{maps.what} in every layer; max, min, mean over layers" + ("" if rolled is None else "; rollout")
    sheets = {"heads": (heads, f"{maps.what} in {names[-1]}, by head"), "layers": (layers, what)}
    written: dict[Path, str] = {}
    for name, (plain, what) in sheets.items():
        sheet = plain if box is None else replace(plain, tiles=tuple(marked(tile, box) for tile in plain.tiles))
        written |= dict.fromkeys(sheet.save_all(out, name, formats), what)
    masks = [mask_contour(picture, mask) for mask in mass_mask(each, style.mass)]
    titles = [f"head {i}" for i in range(len(masks))]
    save(contact_sheet(masks, titles, columns=min(4, len(masks)), tile=style.tile), out / "masks.png")
    written[out / "masks.png"] = f"patches that hold {style.mass:.0%} of each head's mass"
    return written


def _save_arrays(arrays: dict[str, Any], path: Path) -> None:
    values: Any = {name: v.float().cpu().numpy() if isinstance(v, Tensor) else v for name, v in arrays.items()}
    write(path, lambda file: np.savez_compressed(file, **values))


def _of_class_token(loaded: "Loaded", images: Tensor, request: Request) -> TokenMaps:
    """The class token's maps.

    Raises:
        ValueError: there is no class token, or not the same in all layers; one short sentence.
    """
    with torch.inference_mode(), capture(loaded.model, layers=request.layers, heads="each", rows=0) as trace:
        loaded.model(images, **loaded.model_kwargs)
    try:
        with torch.inference_mode():
            return TokenMaps(layer_maps(trace, request.fused), cls_map(trace)[0], "class token's map")
    except ValueError as error:
        raise ValueError(_no_class_token(trace)) from error


def _of_token(token: FoundToken, loaded: "Loaded", images: Tensor, request: Request) -> TokenMaps:
    """The maps of a token, of all layers over the same patches.

    Raises:
        ValueError: the layers attend in windows.
    """
    if token.windows:
        raise ValueError("the layers attend in windows")
    with torch.inference_mode(), capture(loaded.model, token.alike, heads="each", rows=token.index) as trace:
        loaded.model(images, **loaded.model_kwargs)
    with torch.inference_mode():
        maps = layer_maps(trace, request.fused, token=token.index)
        heads = token_map(trace, token.index, token.layer)[0]
        return TokenMaps(maps, heads, f"what {token.name} attends to")


def _no_class_token(trace: Trace) -> str:
    """The reason that the layers of a trace have no class token in common."""
    keys = [side for _, side in trace.all_sides().values()]
    if any(side.cls for side in keys):
        return "the layers attend to different tokens"
    windows = any(side.kind == "windows" for side in keys)
    return "the model attends in windows, without a class token" if windows else "the model has no class token"
