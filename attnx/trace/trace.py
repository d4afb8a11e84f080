"""The maps of a forward pass, and the tokens that their rows and columns stand for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attnx.trace.calls import Calls, RunningMeans
from attnx.trace.display import table_of, text_of
from attnx.trace.gradient_record import backward
from attnx.trace.items import item
from attnx.trace.layer_tokens import LayerTokens
from attnx.trace.layers import Layers, select, selects
from attnx.trace.layout import TokenLayout
from attnx.trace.moving import on_device
from attnx.trace.pass_tokens import PassTokens
from attnx.trace.records import LayerRecord, MapRecord
from attnx.trace.row_stats import RowStats, StatsOfLayers

CALLS = ("last", "all", "mean")


class Trace(LayerTokens):
    """The maps of one forward pass: a mapping {layer name: float32 map} in the order of the calls.

    A map is [B, M, N], or [B, R, N] for R chosen rows, or [B, H, M, N] for heads="each". `trace[-1]` is the map of the
    last layer. A layer that attends twice in one pass appears a second time as "name#2". A new pass replaces the maps
    of the last one. With calls="all", `calls` holds the maps of every pass; with calls="mean", the trace holds the mean
    over passes. For a layer captured with keep="qk" the map is computed each time it is read; `kept` returns its
    record, which gives shapes, rows and vector products without the map.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     output = model(torch.zeros(1, 3, 96, 96))
        >>> list(trace)[0], trace["blocks.0.attn"].shape
        ('blocks.0.attn', torch.Size([1, 145, 145]))
        >>> trace.sides("blocks.0.attn")[1].grid
        (12, 12)
    """

    def __init__(
        self,
        model: nn.Module,
        heads: str,
        rows: tuple[int, ...] | None,
        layout: TokenLayout | None,
        calls: str = "last",
    ) -> None:
        self.heads = heads
        self.rows = rows
        self._mode = calls
        self._records: dict[str, LayerRecord] = {}
        self._stats: dict[str, RowStats] = {}
        self.on_stats: Callable[[str, RowStats], None] | None = None  # called with those of each layer
        self.tokens = PassTokens(model, layout)  # of the current pass
        self.in_a_row = False  # True if the user selected layers that follow one another, whatever their names
        self._calls: list[Trace] = []
        self._means = RunningMeans()

    def __getitem__(self, layer: str | int) -> Tensor:
        return self.kept(layer).map()

    def __contains__(self, layer: object) -> bool:
        return -len(self) <= layer < len(self) if isinstance(layer, int) else layer in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        """The layers as a table, for notebooks."""
        return table_of(self)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the records and the statistics of the trace take."""
        return sum(each.nbytes for each in self._records.values()) + sum(each.nbytes for each in self._stats.values())

    @property
    def stats(self) -> StatsOfLayers:
        """The statistics of a capture with `stats`: {layer: {name: [B, H, M]}}.

        Example:
            >>> import torch, attnx
            >>> from attnx.demo.vit import demo_model
            >>> model = demo_model()
            >>> with torch.no_grad(), attnx.capture(model, keep="stats", stats=["entropy"]) as trace:
            ...     output = model(torch.zeros(1, 3, 96, 96))
            >>> trace.stats[-1]["entropy"].shape
            torch.Size([1, 6, 145])
        """
        return StatsOfLayers(self._stats)

    def kept(self, layer: str | int) -> LayerRecord:
        """The record of a layer: shape, rows and vector products of its map, without the map if keep="qk".

        Raises:
            KeyError: no such layer was captured.
            ValueError: neither a name nor an index.
        """
        if not isinstance(layer, (str, int)):
            raise ValueError(f"layer: expected one name or index; got {layer!r}; trace.select(...) takes several")
        if isinstance(layer, int):
            names = list(self._records)
            if not -len(names) <= layer < len(names):
                raise KeyError(f"layer {layer}: expected an index into {len(names)} layers: {', '.join(names)}")
            layer = names[layer]
        if layer not in self._records:
            earlier = [i for i, call in enumerate(self._calls) if layer in call and call._records is not self._records]
            where = f"; call {earlier[-1]} contains it: trace.calls[{earlier[-1]}]" if earlier else ""
            known = ", ".join(self._records) or "none (nothing was captured)"
            raise KeyError(f"layer {layer!r}: expected one of {known}{where}")
        return self._records[layer]

    def add(
        self, layer: str, record: Tensor | LayerRecord, queries: int | None = None, stats: RowStats | None = None
    ) -> None:
        """Store a layer's map or record; `queries`: number of queries of the layer, if the map has fewer rows."""
        self._records[layer] = MapRecord(record) if isinstance(record, Tensor) else record
        self.tokens.add(layer, queries)
        if stats is not None:
            self._stats[layer] = stats
            if self.on_stats is not None:
                self.on_stats(layer, stats)

    def backward(self, score: Tensor, retain_graph: bool = False) -> None:
        """Compute the maps of a capture with `grad`, from the gradient of `score`. No parameter receives a gradient.

        Args:
            score: one number, such as the logits of a class summed over the batch; each item then has its own map.
            retain_graph: True if another backward pass of the same forward pass follows.

        Raises:
            ValueError: the capture has no `grad`, or the score does not depend on any captured layer.
        """
        backward(list(self._records.values()), score, retain_graph)

    @property
    def calls(self) -> "Calls":
        """One Trace for each stored pass: all passes with calls="all", the last with "last", the mean with "mean".

        Example:
            >>> import torch, attnx
            >>> from attnx.demo.vit import demo_model
            >>> model = demo_model()
            >>> with torch.no_grad(), attnx.capture(model, calls="all") as trace:
            ...     outputs = [model(torch.zeros(1, 3, 96, 96)) for _ in range(2)]
            >>> len(trace.calls), trace.calls[0]["blocks.0.attn"].shape
            (2, torch.Size([1, 145, 145]))
        """
        return Calls(self._calls or [self])

    def select(self, layers: Layers) -> "Trace":
        """A trace of the same pass with some of its layers.

        Args:
            layers: names, globs ("vision_model.*"), names of blocks around layers, indices into the trace, or a list of
                these; None: all layers. `rollout` assumes that the layers of a list follow one another.

        Raises:
            ValueError: a name or index matches no layer of the trace.
        """
        if layers is None:
            return self._with(dict(self._records))
        names = select(list(self._records), layers)
        other = self._with({name: self._records[name] for name in names})
        # The layers of a list follow one another as the user says; a glob or a block's name selects all that ran there.
        ran = self.tokens.ran if isinstance(layers, str) else ()
        other.tokens.ran = {name for name in ran if selects(str(layers), name)}
        other.in_a_row = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) > 1
        return other

    def item(self, index: int) -> "Trace":
        """A trace of one image: the maps [1, M, N] of item `index` of the batch.

        If the images have grids of their own (SigLIP 2), padding is cut off, and the layout is that of the image.

        Raises:
            IndexError: no such item, or the layers have different numbers of items.
        """
        records, stats, tokens = item(self, self._records, index)
        other = self._with(records)
        other._stats, other.tokens = stats, tokens
        return other

    def to(self, device: str | torch.device) -> "Trace":
        """A trace of the same pass on another device. Its maps can be read there; it has no backward pass any more.

        Raises:
            ValueError: not a device.
            RuntimeError: a gradient capture had no backward pass yet.

        Example:
            >>> import torch, attnx
            >>> from attnx.demo.vit import demo_model
            >>> model = demo_model()
            >>> with torch.no_grad(), attnx.capture(model) as trace:
            ...     output = model(torch.zeros(1, 3, 96, 96))
            >>> trace.to("cpu")[-1].device
            device(type='cpu')
        """
        try:
            on = torch.device(device)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"device: expected a device such as 'cpu' or 'cuda'; got {device!r}") from error
        other = self._with({layer: on_device(record, on) for layer, record in self._records.items()})
        other._stats = {layer: stats.to(on) for layer, stats in other._stats.items()}
        return other

    def to_numpy(self) -> dict[str, np.ndarray]:
        """{layer: float32 array} of all maps, copied to the CPU; a layer captured with keep="qk" is computed."""
        return {layer: self[layer].detach().cpu().numpy().copy() for layer in self}

    def save(self, path: str | Path) -> None:
        """Write the trace to one safetensors file, atomically: records, statistics and tokens, but not the model.

        Raises:
            ValueError: the trace has several passes, no layer, or a gradient capture had no backward pass.

        Example:
            >>> import torch, attnx
            >>> from attnx.demo.vit import demo_model
            >>> model = demo_model()
            >>> with torch.no_grad(), attnx.capture(model) as trace:
            ...     output = model(torch.zeros(1, 3, 96, 96))
            >>> trace.save("trace.safetensors")
            >>> torch.equal(attnx.rollout(attnx.Trace.load("trace.safetensors")), attnx.rollout(trace))
            True
        """
        from attnx.trace.saving import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Trace":
        """The trace in a file written by `save`. Methods give what they give of the original, with backend="auto".

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file written by `save`.
        """
        from attnx.trace.saving import load

        return load(Path(path), device)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Trace":
        """A trace of the same pass with `function` applied to each map."""
        return self._with({layer: MapRecord(function(record.map())) for layer, record in self._records.items()})

    def _with(self, records: dict[str, LayerRecord]) -> "Trace":
        """A trace of the same pass with these records."""
        other = Trace(self.tokens.model, self.heads, self.rows, self.tokens.given)
        other._records, other.tokens, other.in_a_row = records, self.tokens.copy(), self.in_a_row
        other._stats = {layer: stats for layer, stats in self._stats.items() if layer in records}
        return other

    def begin_call(self, finished: bool = True) -> None:
        """Start a new pass: store the maps of the last pass, fold them into the mean, or drop them.

        Args:
            finished: True if the last pass finished; the maps of an unfinished pass are dropped.
        """
        if finished:
            self.fold()
        elif self._calls:
            self._calls.pop()
        call = self._with({})
        call.tokens = self.tokens.next_pass()
        # The trace and the call's own trace share the dicts and tokens of the pass, which are updated in place.
        self._records, self._stats, self.tokens = call._records, call._stats, call.tokens
        self._calls = [*self._calls, call] if self._mode == "all" else [call]

    def clear(self) -> None:
        """Drop all passes."""
        self._records, self._stats, self.tokens = {}, {}, self.tokens.next_pass()
        self._calls, self._means = [], RunningMeans()

    def fold(self) -> None:
        """End a pass: with calls="mean" replace its maps by the mean over all passes so far.

        Raises:
            ValueError: the shape or the grid of a layer's map differs from that of earlier passes.
        """
        if self._mode != "mean":
            return
        for layer, record in self._records.items():
            self._means.add(layer, record.map(), self.sides(layer))
        self._records.clear()
        self._records.update({layer: MapRecord(mean) for layer, mean in self._means.maps.items()})
