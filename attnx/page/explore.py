"""The page of one image: what each of its patches attends to, and who attends to it: `attnx.explore`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnx.methods import rollout
from attnx.methods.maps import fusion
from attnx.models.loaded import Loaded, as_picture
from attnx.models.loading import load
from attnx.ops.reducers import Reduction, fuse_heads
from attnx.page.page import CMAPS, Page, assemble, pack, photo_of
from attnx.page.stops import Side, Stop, maps_of, pool_for, to_json
from attnx.trace.capture import capture
from attnx.trace.gradient_record import GradientRecord
from attnx.trace.layers import Layers
from attnx.trace.layout import TokenLayout
from attnx.trace.records import LayerRecord
from attnx.trace.tokens import Tokens
from attnx.trace.trace import Trace
from attnx.trace.window_record import WindowRecord

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Picture

LIMIT = 15e6
"""The largest number of bytes that the maps of a page take without `pool`."""


def explore(
    model: str | Loaded | nn.Module | Trace,
    image: Picture | None = None,
    *,
    heads: str = "mean",
    layers: Layers = None,
    pool: int | None = None,
    text: Sequence[str] = (),
    title: str | None = None,
) -> Page:
    """An interactive page of the attention maps of one image, in one HTML file.

    In the page, pointing at a patch shows what it attends to in each layer, or who attends to it. Layers whose tokens
    have no known place in the picture are shown as rows of tokens. After the layers come the mean, maximum and minimum
    over layers, and rollout. A value in the page is off by less than 1/255 of its map's maximum.

    Args:
        model: a name, as `attnx.load` takes it, or what it returns; a timm model; or a trace of one image, captured
            with all rows, for any other model.
        image: a picture, or the path of one; it is prepared as a whole. For a trace: the part of the picture that the
            model saw; None: the page has no picture.
        heads: "mean", "max", "min", or "each". For a trace it is that of its capture.
        layers: as in `attnx.capture`; without rollout, unless it is one glob ("vision_model.*"). For a trace: those of
            it.
        pool: pools of `pool` x `pool` keys are stored as their mean. None: 1, or as much as is needed so that the maps
            take at most 15 MB; the page says so.
        text: names of the tokens on the text side of a trace, such as word pieces.
        title: of the page; None: the model's name.

    Returns:
        a `Page`: `page.save("page.html")`; notebooks show it.

    Raises:
        ValueError: an invalid argument, no layer to show, a trace of several images or of chosen rows, or maps with
            negative values or NaN.
        ImageError: the picture can't be read.

    Example:
        >>> from PIL import Image
        >>> page = attnx.explore("demo", Image.new("RGB", (128, 96)), heads="each")
        >>> page.save("page.html")
    """
    if pool is not None and (isinstance(pool, bool) or not isinstance(pool, int) or pool < 1):
        raise ValueError(f"pool: expected an int of at least 1, or None; got {pool!r}")
    picture = None if image is None else as_picture(image)
    if isinstance(model, Trace):
        trace = model if layers is None else model.select(layers)
        name = type(model.tokens.model).__name__ if title is None else title
    else:
        loaded = _loaded(model)
        if picture is None:
            raise ValueError("image: expected a picture, or the path of one; got None, which only a trace may have")
        images = loaded.prepare(picture)[None].to(next(loaded.model.parameters()).device)
        with torch.inference_mode(), capture(loaded.model, layers, heads, keep="auto") as trace:
            loaded.model(images, **loaded.model_kwargs)
        name = loaded.name if title is None else title
    with torch.inference_mode():
        # A glob selects the layers of a part of the model; other choices leave out layers of a chain.
        reading = _Reading(trace, text, chosen=not (layers is None or (isinstance(layers, str) and "*" in layers)))
        return page_of(reading.stops, reading.layers - 1, name, picture, pool, reading.notes)


def page_of(
    stops: Sequence[Stop], start: int, title: str, picture: Image | None, pool: int | None = None,
    notes: Sequence[str] = (), **data: Any,
) -> Page:  # fmt: skip
    """The page of some stops, which shows stop `start` first; `data`: more values for its script."""
    wanted, notes = pool or pool_for(stops, LIMIT), list(notes)
    if wanted > 1:
        why = "" if pool else f", so that the maps take at most {LIMIT / 1e6:.0f} MB; pool=1 keeps each of them"
        notes.append(f"A value is the mean of {wanted} x {wanted} keys{why}.")
    content = pack(maps_of(stops, wanted))
    values = {"start": start, "cmaps": CMAPS, "notes": notes, **photo_of(picture), **to_json(stops, wanted), **data}
    return assemble("explore", title, values, content)


class _Reading:
    """The stops of a trace.

    Attributes:
        notes: the layers and fusions that are left out, and the reasons.
        stops: the layers, and the fusions over layers.
        layers: number of layers among them.
    """

    def __init__(self, trace: Trace, text: Sequence[str], chosen: bool) -> None:
        if trace.rows is not None:
            raise ValueError(f"trace: expected a capture with rows=None; got rows={list(trace.rows)}")
        self.notes: list[str] = []
        self._trace, self._text = trace, tuple(text)
        self._registers = _registers(trace.tokens.model)
        layers = [stop for layer in trace if (stop := self._stop_of(layer)) is not None]
        if not layers:
            why = self.notes[0] if self.notes else "nothing was captured"
            raise ValueError(f"explore: expected a layer with one map of an image; got {len(trace)} others: {why}")
        self.layers = len(layers)
        alike = max((_alike(stop, layers) for stop in layers), key=len)
        fused = _Fused(alike) if len(alike) > 1 else None
        self.stops = [*layers, *([] if fused is None else fused.stops), *self._rollout(layers, chosen)]

    def _stop_of(self, layer: str) -> Stop | None:
        """The stop of a layer; None, with a note, if it has several maps."""
        trace, windows = self._trace, self._trace.windows(layer)
        record: LayerRecord | WindowRecord = trace.kept(layer)
        queries, keys = trace.sides(layer)
        if windows is not None:
            record = WindowRecord(record, windows, renormalise=not isinstance(record, GradientRecord))
            side = Side(grid=windows.grid)
            sides = side, side
        elif keys.kind == "channels":
            self.notes.append(f"{layer} is not shown: it attends over channels.")
            return None
        else:
            sides = self._side(queries, layer, queries == keys), self._side(keys, layer, True)
        if (items := record.shape[0]) != 1:
            kind = "windows whose places are unknown" if keys.kind == "windows" else f"{items} maps"
            advice = "" if keys.kind == "windows" else "; of a batch, pass trace.item(0)"
            self.notes.append(f"{layer} is not shown: it has {kind}{advice}.")
            return None
        each = len(record.shape) == 4
        heads = ("mean", *(f"head {i}" for i in range(record.shape[1]))) if each else (trace.heads,)
        read = partial(_read, record, fusion(trace, None) if each else None)
        return Stop(layer, *sides, heads, read, None if windows is None else windows.size)

    def _side(self, tokens: Tokens, layer: str, keys: bool) -> Side:
        """A side of a layer's map; `keys`: it has the tokens of the keys."""
        layout = tokens.layout
        if layout is None and keys:
            with suppress(ValueError):
                layout = self._trace.layout_of(layer)
        if layout is not None and layout.frames > 1:
            layout = None
        if layout is None:
            word = {"text": "text", "queries": "query"}.get(tokens.kind, "token")
            names = tuple(f"{word} {i}" for i in range(tokens.count)) if tokens.count > 1 else (word,)
            return Side(self._text if tokens.kind == "text" and len(self._text) == tokens.count else names)
        after = tuple(f"token {layout.tokens - layout.suffix + i}" for i in range(layout.suffix))
        return Side(self._before(layout), layout.grid, after)

    def _before(self, layout: TokenLayout) -> tuple[str, ...]:
        first = layout.prefix - self._registers
        names = [f"register {i - first + 1}" if i >= first > 0 else f"token {i}" for i in range(layout.prefix)]
        return tuple("class" if i == 0 and layout.cls else name for i, name in enumerate(names))

    def _rollout(self, layers: list[Stop], chosen: bool) -> Iterator[Stop]:
        """The rollout of each query, or of the class token alone; nothing, with a note, if the model has none."""
        if chosen or any(isinstance(self._trace.kept(layer), GradientRecord) for layer in self._trace):
            what = "chosen layers" if chosen else "maps weighted by gradients"
            self.notes.append(f"There is no rollout of {what}.")
            return
        with suppress(ValueError):
            whole = rollout(self._trace, query="all")
            own = [stop.keys for stop in layers if stop.queries == stop.keys]
            last, first = ({side.count(): side for side in sides} for sides in (own, own[::-1]))
            _, rows, columns = whole.shape
            if rows in last and columns in first:
                yield Stop("rollout", last[rows], first[columns], ("fused",), lambda: whole)
                return
        try:
            one = rollout(self._trace)
        except ValueError as error:
            # The first part says what was expected; the rest lists layers.
            self.notes.append(f"There is no rollout: {str(error).removeprefix('layers: ').partition(';')[0]}.")
            return
        keys = Side(grid=(one.shape[-2], one.shape[-1]))
        yield Stop("rollout", Side(("result",)), keys, ("fused",), lambda: one.flatten(1)[None])


class _Fused:
    """The mean, maximum and minimum over layers with the same tokens, of their maps with heads fused."""

    def __init__(self, layers: Sequence[Stop]) -> None:
        self._layers = layers
        first = layers[0]
        self.stops = [
            Stop(f"{name} over {len(layers)} layers", first.queries, first.keys, ("fused",), partial(self._read, name))
            for name in ("mean", "max", "min")
        ]

    def _read(self, name: str) -> Tensor:
        return self._maps[name]

    @cached_property
    def _maps(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in self._layers:
            amap = layer.read()[:1].float()
            found = {
                "mean": found["mean"] + amap if found else amap,
                "max": torch.maximum(found["max"], amap) if found else amap,
                "min": torch.minimum(found["min"], amap) if found else amap,
            }
        return found | {"mean": found["mean"] / len(self._layers)}


def _read(record: LayerRecord | WindowRecord, kind: Reduction | None) -> Tensor:
    """The maps of a layer, [heads, M, N]; `kind`: how to fuse the heads for the first map, None if they are fused."""
    maps = record.map()
    return maps if kind is None else torch.cat([fuse_heads(maps, kind), maps[0]])


def _alike(stop: Stop, layers: Sequence[Stop]) -> list[Stop]:
    """The layers with the tokens of a layer of self-attention."""
    own = (stop.queries, stop.keys)
    return [other for other in layers if (other.queries, other.keys) == own] if stop.queries == stop.keys else []


def _registers(model: nn.Module | None) -> int:
    """Number of register tokens that a model declares, as in timm, DINOv2 and Hugging Face."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for owner in (module, getattr(module, "config", None)):
            for name in ("num_reg_tokens", "num_register_tokens", "n_storage_tokens", "num_registers"):
                if isinstance(count := getattr(owner, name, None), int) and count:
                    return count
    return 0


def _loaded(model: str | Loaded | nn.Module) -> Loaded:
    """The model and its preprocessing.

    Raises:
        ValueError: a module whose preprocessing is unknown.
    """
    from attnx.models.timm import with_timm_config

    if isinstance(model, Loaded):
        return model
    if isinstance(model, str):
        return load(model)
    if isinstance(model, nn.Module) and getattr(model, "pretrained_cfg", None):
        if model.training:
            raise ValueError("model: expected eval mode; got training mode; call model.eval()")
        return with_timm_config(type(model).__name__, model, None)
    got = type(model).__name__
    raise ValueError(f"model: expected a name, the result of attnx.load, a timm model or a trace; got {got}")
