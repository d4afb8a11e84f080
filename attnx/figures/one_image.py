"""Pictures of one image for `attnx show`."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnx.extract.extractor import Extractor
from attnx.extract.place import Place, layout_of_tokens
from attnx.figures.picture import coloured, marked, mask_contour, overlay, save, with_colorbar, write
from attnx.figures.sheets import contact_sheet, heads_grid, layers_figure
from attnx.figures.style import Style
from attnx.messages import one_line
from attnx.methods import LayerMaps, cls_map, layer_maps, mass_mask, rollout, token_map
from attnx.methods.maps import cls_layer
from attnx.methods.received import last_on_grid, received
from attnx.trace.capture import capture
from attnx.trace.layers import Layers
from attnx.trace.layout import TokenLayout
from attnx.trace.trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Loaded


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Request:
    """The maps to show.

    Attributes:
        method: "rollout", "cls", "layers" or "token".
        layers: as in `attnx.capture`.
        heads: "mean", "max", "min" or "each".
        rolling: further arguments of `attnx.rollout`.
        token: the token of method "token".
    """

    method: str = "rollout"
    layers: Layers = None
    heads: str = "mean"
    rolling: dict[str, Any] = field(default_factory=dict)
    token: Place | None = None

    @property
    def fused(self) -> str:
        """How heads are fused where one map is shown."""
        return "mean" if self.heads == "each" else self.heads


@dataclass(frozen=True)
class Shown:
    """A map for the whole picture.

    Attributes:
        amap: [h, w]; for a matrix [queries, keys].
        what: description.
        name: file name of its picture: "overlay", "received" or "matrix".
        box: the patch whose map it is, in shares of the picture; None: no patch.
    """

    amap: Tensor
    what: str
    name: str = "overlay"
    box: Box | None = None

    def over(
        self, picture: "Image", style: Style, limits: tuple[float, float] | None = None
    ) -> "tuple[Image, tuple[float, float] | None]":
        """The picture under the map, and the limits of its colours; a matrix stands alone, without limits.

        limits: as in `attnx.picture.overlay`.
        """
        if self.name == "matrix":
            return _matrix(self.amap, style.cmap), None
        found, limits = coloured(picture, self.amap, style.interpolation, style.cmap, style.alpha, limits)
        return found if self.box is None else marked(found, self.box), limits


class TokenMaps(NamedTuple):
    """The maps of one token: in every layer, in each head of the last one [H, h, w], and what they are."""

    layers: LayerMaps
    heads: Tensor
    what: str


def draw(
    picture: "Image", loaded: "Loaded", out: Path, request: Request, style: Style, device: torch.device,
    formats: tuple[str, ...] = (), arrays: bool = False,
) -> dict[Path, str]:  # fmt: skip
    """Write overlay.png, heads.png, masks.png and layers.png to `out`; {path: description} of the written files.

    A model without a rollout gets the class token's map as overlay.png, or, without a class token, received.png: the
    attention that each patch receives in the last layer over a known grid. If there is no such layer, matrix.png has
    the last layer's map, queries by keys. The descriptions give the reasons.

    Args:
        formats: "pdf" and "svg", in which heads and layers are written, too.
        arrays: write maps.npz, too.

    Raises:
        ValueError: the method has no map and is not rollout with default options.
    """
    images = loaded.prepare(picture)[None].to(device)
    written: dict[Path, str] = {}
    stored: dict[str, Any] = {}
    shown = main_map(picture, loaded, images, request, extractor_of(loaded, request))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{shown.name}.png"
    written[path] = shown.what
    stored["map"] = shown.amap
    image, limits = shown.over(picture, style)
    save(with_colorbar(image, limits, style.cmap) if style.colorbar and limits else image, path)
    try:
        if request.token is None:
            maps = _of_class_token(loaded, images, request)
        else:
            maps = _of_token(request.token, picture, loaded, images, request)
    except ValueError as error:
        written[path] += f"; no heads.png, masks.png and layers.png: {error}"
    else:
        rolled = shown.amap if shown.what == "rollout" else None
        if request.method not in ("rollout", "token"):
            whole = Request(rolling=request.rolling)
            extract = extractor_of(loaded, whole)
            assert extract is not None
            rolled, _ = _rolled(extract, images, whole)
        stored |= {"heads": maps.heads, "layers": maps.layers.maps[0], "names": np.array(maps.layers.names)}
        stored |= {} if rolled is None else {"rollout": rolled}
        written |= _draw_sheets(picture, maps, rolled, shown.box, out, style, formats)
    if arrays:
        _save_arrays(stored, out / "maps.npz")
        written[out / "maps.npz"] = f"the maps as float32 arrays: {', '.join(stored)}"
    return written


def extractor_of(loaded: "Loaded", request: Request) -> Extractor | None:
    """The extractor of the requested method; None for a token, whose place may depend on the picture."""
    if request.method == "token":
        return None
    options = request.rolling if request.method == "rollout" else {}
    return Extractor(
        loaded.model, request.method, layers=request.layers, heads=request.fused, model_kwargs=loaded.model_kwargs,
        **options,
    )  # fmt: skip


def main_map(picture: "Image", loaded: "Loaded", images: Tensor, request: Request, extract: Extractor | None) -> Shown:
    """The map of the requested method for the whole picture; `extract`: that of `extractor_of`.

    Raises:
        ValueError: the method has no map and is not rollout with default options.
    """
    if extract is None:
        return _shown_token(picture, loaded, images, request)
    if request.method == "rollout":
        rolled, why = _rolled(extract, images, request)
        if rolled is not None:
            return Shown(rolled, "rollout")
        shown = _without_rollout(loaded, images, request)
        return Shown(shown.amap, f"{shown.what}; no rollout: {why}", shown.name)
    amap = extract(images)[0]
    what = "class token's map"
    return Shown(amap, what) if amap.dim() == 2 else Shown(amap.mean(0), f"{what}, mean over layers")


def _shown_token(picture: "Image", loaded: "Loaded", images: Tensor, request: Request) -> Shown:
    """The map of the requested token in the last layer over patches, or over windows."""
    assert request.token is not None
    with torch.inference_mode(), capture(loaded.model, request.layers, request.fused, keep="auto") as trace:
        loaded.model(images, **loaded.model_kwargs)
    layer, layout = layout_of_tokens(trace)
    token = request.token.token(layout, (picture.height, picture.width))
    with torch.inference_mode():
        what = f"what {_token_name(token, layout)} attends to in {layer}"
        return Shown(token_map(trace, token, layer)[0], what, box=_box(token, layout))


def _token_name(token: int, layout: TokenLayout) -> str:
    at = token + layout.tokens if token < 0 else token
    if at < layout.prefix or at >= layout.prefix + layout.patch_count:
        return f"token {token}"
    row, column = divmod((at - layout.prefix) % (layout.grid[0] * layout.grid[1]), layout.grid[1])
    return f"token {at} (the patch in row {row}, column {column})"


def _box(token: int, layout: TokenLayout) -> Box | None:
    """The patch of a token in shares of the picture; None for another token."""
    at = (token + layout.tokens if token < 0 else token) - layout.prefix
    if not 0 <= at < layout.patch_count:
        return None
    (rows, columns), (row, column) = layout.grid, divmod(at % (layout.grid[0] * layout.grid[1]), layout.grid[1])
    return column / columns, row / rows, (column + 1) / columns, (row + 1) / rows


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
        for kind in ("png", *formats):
            sheet.save(out / f"{name}.{kind}")
            written[out / f"{name}.{kind}"] = what
    masks = [mask_contour(picture, mask) for mask in mass_mask(each, style.mass)]
    titles = [f"head {i}" for i in range(len(masks))]
    save(contact_sheet(masks, titles, columns=min(4, len(masks)), tile=style.tile), out / "masks.png")
    written[out / "masks.png"] = f"patches that hold {style.mass:.0%} of each head's mass"
    return written


def _save_arrays(arrays: dict[str, Any], path: Path) -> None:
    values: Any = {name: v.float().cpu().numpy() if isinstance(v, Tensor) else v for name, v in arrays.items()}
    write(path, lambda file: np.savez_compressed(file, **values))


def _rolled(extract: Extractor, images: Tensor, request: Request) -> tuple[Tensor | None, str]:
    """(rollout [h, w], ""), or None and the reason that the model has none.

    Raises:
        ValueError: the rollout fails with other options than the defaults.
    """
    try:
        return extract(images)[0], ""
    except ValueError as error:
        defaults = signature(rollout).parameters
        if any(value != defaults[name].default for name, value in request.rolling.items()):
            raise
        # The first part says what was expected; the rest lists layers.
        return None, one_line(str(error).removeprefix("layers: ").partition(";")[0], 160)


def _without_rollout(loaded: "Loaded", images: Tensor, request: Request) -> Shown:
    """The map of a model without a rollout."""
    with torch.inference_mode(), capture(loaded.model, layers=request.layers, heads=request.fused) as trace:
        loaded.model(images, **loaded.model_kwargs)
    with torch.inference_mode():
        with suppress(ValueError):
            return Shown(cls_map(trace)[0], f"class token's map in {cls_layer(trace)}")
        with suppress(ValueError):
            layer = last_on_grid(trace)
            what = f"how much each patch is attended to in {layer}, mean over its queries"
            return Shown(received(trace, layer)[0], what, "received")
        layer = list(trace)[-1]
        first = ", first window" * (trace.sides(layer)[1].kind == "windows")
        what = f"map of {layer}{first}: a row for each query, a column for each key; no layer is over a known grid"
        return Shown(trace[layer][0], what, "matrix")


def _matrix(amap: Tensor, cmap: str) -> "Image":
    """A map [M, N] as a picture, 768 pixels at its longer side."""
    from PIL import Image

    rows, columns = amap.shape
    height, width = (max(1, 768 * n // max(rows, columns)) for n in (rows, columns))
    canvas = Image.new("RGB", (width, height))
    return overlay(canvas, amap, interpolation="nearest", cmap=cmap, alpha=1)


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


def _of_token(place: Place, picture: "Image", loaded: "Loaded", images: Tensor, request: Request) -> TokenMaps:
    """The maps of a token, of all layers over the same patches.

    Raises:
        ValueError: the layers attend in windows, or there is no such token.
    """
    with torch.inference_mode(), capture(loaded.model, layers=request.layers, rows=0) as trace:
        loaded.model(images, **loaded.model_kwargs)
    last, layout = layout_of_tokens(trace)
    if trace.windows(last) is not None:
        raise ValueError("the layers attend in windows")
    token = place.token(layout, (picture.height, picture.width))
    # A pooling layer, or one of another stage, has other queries.
    alike: Layers = [name for name in trace if trace.sides(name) == trace.sides(last) and "#" not in name]
    with torch.inference_mode(), capture(loaded.model, layers=alike, heads="each", rows=token) as trace:
        loaded.model(images, **loaded.model_kwargs)
    with torch.inference_mode():
        maps = layer_maps(trace, request.fused, token=token)
        heads = token_map(trace, token, last)[0]
        return TokenMaps(maps, heads, f"what {_token_name(token, layout)} attends to")


def _no_class_token(trace: Trace) -> str:
    """The reason that the layers of a trace have no class token in common."""
    keys = [side for _, side in trace.all_sides().values()]
    if any(side.cls for side in keys):
        return "the layers attend to different tokens"
    windows = any(side.kind == "windows" for side in keys)
    return "the model attends in windows, without a class token" if windows else "the model has no class token"
