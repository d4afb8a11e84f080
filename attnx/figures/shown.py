"""The map that `attnx show` draws over a whole picture."""

from contextlib import suppress
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnx.extract.extractor import Extractor
from attnx.extract.place import Place
from attnx.figures.found_token import FoundToken, find_token
from attnx.figures.picture import coloured, marked, overlay
from attnx.figures.style import Style
from attnx.messages import one_line
from attnx.methods import cls_map, rollout, token_map
from attnx.methods.maps import cls_layer
from attnx.methods.received import last_on_grid, received
from attnx.trace.capture import capture
from attnx.trace.layers import Layers

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Loaded


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
        """The fusion of the heads where one map is shown."""
        return "mean" if self.heads == "each" else self.heads


@dataclass(frozen=True)
class Shown:
    """A map for the whole picture.

    Attributes:
        amap: [h, w]; for a matrix [queries, keys].
        what: description.
        name: file name of its picture: "overlay", "received" or "matrix".
        token: the token whose map it is; None: another map.
    """

    amap: Tensor
    what: str
    name: str = "overlay"
    token: FoundToken | None = None

    def over(
        self, picture: "Image", style: Style, limits: tuple[float, float] | None = None, side: int | None = None
    ) -> "tuple[Image, tuple[float, float] | None]":
        """The picture under the map, and the limits of its colours; a matrix stands alone, without limits.

        limits: as in `attnx.picture.overlay`.
        side: pixels of the longer side of a matrix; None: 768.
        """
        if self.name == "matrix":
            return _matrix(self.amap, style.cmap, side or 768), None
        found, limits = coloured(picture, self.amap, style.interpolation, style.cmap, style.alpha, limits)
        box = None if self.token is None else self.token.box
        return found if box is None else marked(found, box), limits


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
        rolled, why = rolled_or_why(extract, images, request)
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
    token = find_token(request.token, picture, loaded, images, request.layers)
    # A window has its own queries, and the calls of a layer that is called again may have others.
    layer, _, again = token.layer.partition("#")
    rows = None if token.windows or again else token.index
    with torch.inference_mode(), capture(loaded.model, layer, request.fused, rows=rows, keep="auto") as trace:
        loaded.model(images, **loaded.model_kwargs)
    with torch.inference_mode():
        what = f"what {token.name} attends to in {token.layer}"
        return Shown(token_map(trace, token.index, token.layer)[0], what, token=token)


def rolled_or_why(extract: Extractor, images: Tensor, request: Request) -> tuple[Tensor | None, str]:
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


def _matrix(amap: Tensor, cmap: str, side: int) -> "Image":
    """A map [M, N] as a picture with `side` pixels at its longer side."""
    from PIL import Image

    rows, columns = amap.shape
    height, width = (max(1, side * n // max(rows, columns)) for n in (rows, columns))
    canvas = Image.new("RGB", (width, height))
    return overlay(canvas, amap, interpolation="nearest", cmap=cmap, alpha=1)
