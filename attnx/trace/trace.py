"""The maps of a forward pass, and the tokens that their rows and columns stand for."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from attnx.trace.calls import Calls, RunningMeans
from attnx.trace.gradient_record import backward
from attnx.trace.items import item
from attnx.trace.layers import Layers, select, selects
from attnx.trace.layout import TokenLayout
from attnx.trace.pass_tokens import PassTokens
from attnx.trace.records import LayerRecord, MapRecord, has_no_map
from attnx.trace.row_stats import RowStats, StatsOfLayers
from attnx.trace.tokens import Tokens, describe
from attnx.trace.windows import Windows

CALLS = ("last", "all", "mean")


class Trace(Mapping[str, Tensor]):
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
        what = {name: "no map" if has_no_map(record) else list(record.shape) for name, record in self._records.items()}
        shapes = ", ".join(f"{name}: {shape}" for name, shape in what.items())
        return f"Trace(heads={self.heads!r}, {{{shapes}}})"

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
        """
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

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Trace":
        """A trace of the same pass with `function` applied to each map."""
        return self._with({layer: MapRecord(function(record.map())) for layer, record in self._records.items()})

    def _with(self, records: dict[str, LayerRecord]) -> "Trace":
        """A trace of the same pass with these records."""
        other = Trace(self.tokens.model, self.heads, self.rows, self.tokens.given)
        other._records, other.tokens = records, self.tokens.copy()
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

    def sides(self, layer: str | int) -> tuple[Tokens, Tokens]:
        """(queries, keys): the tokens that the rows and the columns of a layer's map stand for.

        Raises:
            KeyError: no such layer was captured.
        """
        shape = self.kept(layer).shape
        size = shape[0], shape[-2 if self.rows is None else -1], shape[-1]
        return self.tokens.sides(self._name(layer), size, self._records)

    def windows(self, layer: str | int) -> Windows | None:
        """The windows in which a layer attends: their index into the grid of the image.

        A map of the layer is [B * nW, K, K]: item b * nW + w is window w of image b. None if the layer does not attend
        in windows, or in windows that attnx does not know.

        Raises:
            KeyError: no such layer was captured.

        Example:
            >>> import timm, torch, attnx
            >>> model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1)).eval()
            >>> with torch.no_grad(), attnx.capture(model) as trace:
            ...     logits = model(torch.zeros(2, 3, 56, 56))
            >>> windows = trace.windows("layers.0.blocks.0.attn")
            >>> windows.grid, windows.index.shape, trace["layers.0.blocks.0.attn"].shape
            ((14, 14), torch.Size([4, 49]), torch.Size([8, 49, 49]))
        """
        self.kept(layer)
        return self.tokens.windows(self._name(layer))

    def all_sides(self) -> dict[str, tuple[Tokens, Tokens]]:
        """{layer: (queries, keys)} of every layer."""
        return {layer: self.sides(layer) for layer in self}

    @property
    def layout(self) -> TokenLayout:
        """Token layout of the maps' columns, inferred from the model and its input, or as passed to `capture`.

        Raises:
            ValueError: the layers have different tokens (the message lists them), or the model does not declare its
                layout: pass `layout=`.
        """
        if self.tokens.given is not None and not self._records:
            return self.tokens.given
        if not self._records:
            raise ValueError("layout: no layer was captured yet")
        keys = {self.sides(layer)[1]: layer for layer in self._records}
        if len(keys) > 1:
            raise ValueError(
                f"layout: expected layers over the same tokens; got {describe(self.all_sides())}; "
                "choose layers= of one kind"
            )
        return self.layout_of(next(iter(keys.values())))

    def layout_of(self, layer: str | int) -> TokenLayout:
        """Token layout of the columns of one layer's map.

        Raises:
            KeyError: no such layer was captured.
            ValueError: the columns are not patches of an image, or the model does not declare its layout: pass
                `layout=`.
        """
        keys = self.sides(layer)[1]
        return self.tokens.layout(self._name(layer), keys, self._records)

    def _name(self, layer: str | int) -> str:
        """Name of a layer that was captured."""
        return list(self._records)[layer] if isinstance(layer, int) else layer
