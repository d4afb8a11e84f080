"""The maps of a forward pass, and the tokens that their rows and columns stand for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from attnx.trace.gradient_record import GradientRecord
from attnx.trace.layers import Layers, matches
from attnx.trace.layout import TokenLayout, infer_layout
from attnx.trace.records import LayerRecord, MapRecord
from attnx.trace.sides import Facts, Parts, Tokens, of_layout, sides, stack_of

CALLS = ("last", "all", "mean")


class Trace(Mapping[str, Tensor]):
    """The maps of one forward pass: layer name -> float32 map, in the order of the calls.

    A map is [B, M, N]; [B, R, N] for R chosen rows; [B, H, M, N] for heads="each". `trace[-1]` is the last layer's.
    A layer that attends twice in one pass appears a second time as "name#2". A new pass replaces the last one's maps;
    `calls` has those of every pass, if the capture keeps them (calls="all"), or the trace is their mean (calls="mean").
    Of a layer that was captured with keep="qk" the map is made when it is read, every time; `kept` gives the rest.
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
        self._model = model
        self._layout = layout
        self._mode = calls
        self._kept: dict[str, LayerRecord] = {}
        self._grids: dict[str, tuple[int, int]] = {}
        self._queries: dict[str, int] = {}
        self._facts: dict[str, Facts] = {}
        self._beside: list[tuple[str, str]] = []
        self._sides: dict[str, tuple[Tokens, Tokens]] = {}
        # What is known of the layers whatever the pass.
        self._known: dict[str, Facts] = {}
        self._parts: dict[tuple[str, ...], Parts] = {}
        self.in_a_row = False  # whether the user says that the layers follow one another, whatever they are called
        self._calls: list[Trace] = []
        self._means: dict[str, tuple[int, Tensor]] = {}

    def __getitem__(self, layer: str | int) -> Tensor:
        return self.kept(layer).map()

    def __contains__(self, layer: object) -> bool:
        if isinstance(layer, int):
            return -len(self) <= layer < len(self)
        return layer in self._kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(kept.shape)}" for name, kept in self._kept.items())
        return f"Trace(heads={self.heads!r}, {{{shapes}}})"

    @property
    def nbytes(self) -> int:
        """What the trace holds in memory."""
        return sum(kept.nbytes for kept in self._kept.values())

    def kept(self, layer: str | int) -> LayerRecord:
        """What was kept of a layer: its map's shape, rows and products, without making the map of one kept as q and k.

        Raises:
            KeyError: no such layer was captured.
        """
        if isinstance(layer, int):
            names = list(self._kept)
            if not -len(names) <= layer < len(names):
                raise KeyError(f"layer {layer}: expected an index into {len(names)} layers: {', '.join(names)}")
            layer = names[layer]
        if layer not in self._kept:
            earlier = [i for i, call in enumerate(self._calls) if layer in call and call._kept is not self._kept]
            where = f"; call {earlier[-1]} has it: trace.calls[{earlier[-1]}]" if earlier else ""
            known = ", ".join(self._kept) or "none (nothing was heard)"
            raise KeyError(f"layer {layer!r}: expected one of {known}{where}")
        return self._kept[layer]

    def add(self, layer: str, kept: Tensor | LayerRecord, queries: int | None = None) -> None:
        """Keeps a layer's map, or what it is made of; queries: how many the layer has, if not as many as the map."""
        self._kept[layer] = MapRecord(kept) if isinstance(kept, Tensor) else kept
        self._sides.pop(layer, None)
        if queries is not None:
            self._queries[layer] = queries

    def note(self, layer: str, facts: Facts) -> None:
        """Keeps what a layer's call shows of its sides, for this pass, and for later ones that show nothing."""
        self._facts[layer] = self._known[layer.partition("#")[0]] = facts

    def note_beside(self, module: str, other: str) -> None:
        """Keeps that two modules were given the same input: they stand side by side, and not in a row."""
        self._beside.append((module, other))

    def side_by_side(self) -> tuple[str, str] | None:
        """Two modules with layers of this trace that were given the same input, if there are such."""
        for pair in self._beside:
            if all(any(matches(module, name.partition("#")[0]) for name in self._kept) for module in pair):
                return pair
        return None

    def backward(self, score: Tensor, retain_graph: bool = False) -> None:
        """Has a capture with `grad` make its maps: those of the gradient of `score`. No parameter gets a gradient.

        Args:
            score: one number, such as a class's logits summed over the batch: each item's map is then its own.
            retain_graph: another backward pass of the same forward pass will follow.

        Raises:
            ValueError: the capture has no `grad`, or the score does not depend on any captured layer.
        """
        outs = [kept.out for kept in self._kept.values() if isinstance(kept, GradientRecord) and kept.out is not None]
        if not self._kept:
            raise ValueError(
                "backward: no attention was captured: the model was not called inside the capture, or it calls neither "
                "F.scaled_dot_product_attention nor nn.MultiheadAttention"
            )
        if not outs:
            raise ValueError("backward: expected a capture with grad=True, and a graph that was not freed before")
        if not score.requires_grad or score.numel() != 1:
            raise ValueError(
                f"score: expected one number that depends on the captured layers; got {list(score.shape)}"
                + ("" if score.requires_grad else ", which needs no gradient")
            )
        found = torch.autograd.grad(score, outs, retain_graph=retain_graph, allow_unused=True)
        if all(grad is None for grad in found):
            raise ValueError("score: expected one that depends on a captured layer; got one that depends on none")
        if not retain_graph:
            for kept in self._kept.values():
                if isinstance(kept, GradientRecord):
                    kept.out = None

    @property
    def calls(self) -> "Calls":
        """The passes that were kept, a Trace each: all with calls="all"; one with "last"; with "mean" one, the mean.

        Example:
            >>> with torch.no_grad(), attnx.capture(model, calls="all") as trace:  # doctest: +SKIP
            ...     model.generate(**inputs)
            >>> trace.calls[0]["model.vision_tower.encoder.layers.0.self_attn"].shape  # doctest: +SKIP
        """
        return Calls(self._calls or [self])

    def select(self, layers: Layers) -> "Trace":
        """The same pass with some of its layers.

        Args:
            layers: names, globs ("vision_model.*"), blocks around layers, indices into the trace, or a list of them;
                None: all. Of a list `rollout` takes it that they stand in a row.

        Raises:
            ValueError: a name or index that matches no layer of the trace.
        """
        if layers is None:
            return self._with(dict(self._kept))
        asked = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
        names = list(self._kept)
        chosen: set[str] = set()
        for one in asked:
            if isinstance(one, int) and not isinstance(one, bool):
                found = names[one : one + 1 or None] if -len(names) <= one < len(names) else []
            else:
                found = self.select_names(one) if isinstance(one, str) else []
            if not found:
                raise ValueError(f"layers: {one!r} matches no layer of the trace; expected some of {', '.join(names)}")
            chosen |= set(found)
        if not chosen:
            raise ValueError("layers: expected at least one layer of the trace; got none")
        other = self._with({name: self._kept[name] for name in names if name in chosen})
        other.in_a_row = len(asked) > 1
        return other

    def select_names(self, pattern: str) -> list[str]:
        """Names of the layers that a name, glob or block selects; none if it matches none."""
        return [name for name in self._kept if _names(pattern, name)]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Trace":
        """The same with each map, as it is now, replaced by what the function makes of it."""
        return self._with({layer: MapRecord(function(kept.map())) for layer, kept in self._kept.items()})

    def _with(self, kept: dict[str, LayerRecord]) -> "Trace":
        """A trace of the same pass that has these layers."""
        other = Trace(self._model, self.heads, self.rows, self._layout)
        other._kept, other._grids, other._queries = kept, dict(self._grids), dict(self._queries)
        other._facts, other._known, other._parts = dict(self._facts), self._known, self._parts
        other._beside = list(self._beside)
        return other

    def add_grid(self, convolution: str, grid: tuple[int, int]) -> None:
        """Keeps the grid (rows, columns) that a patch convolution gave; the newest stands first."""
        self._grids.pop(convolution, None)
        self._grids = {convolution: grid, **self._grids}
        self._sides.clear()
        if self._calls:
            self._calls[-1]._grids = self._grids

    def begin_call(self, finished: bool = True) -> None:
        """A new pass of the model: the last one's maps are kept, folded into the mean, or forgotten.

        Args:
            finished: whether the last pass came to its end; what one that did not has left is forgotten.
        """
        if finished:
            self.fold()
        elif self._calls:
            self._calls.pop()
        call = self._with({})
        call._grids, call._queries, call._facts, call._beside = {}, {}, {}, []
        self._kept, self._grids, self._queries, self._facts = call._kept, call._grids, call._queries, call._facts
        self._beside, self._sides = call._beside, {}
        self._calls = [*self._calls, call] if self._mode == "all" else [call]

    def clear(self) -> None:
        """Forgets every pass."""
        self._kept, self._grids, self._queries, self._calls, self._means = {}, {}, {}, [], {}
        self._facts, self._beside, self._sides = {}, [], {}

    def fold(self) -> None:
        """The pass is over: with calls="mean" its maps become the mean of all passes so far.

        Raises:
            ValueError: a layer's maps have another shape than before.
        """
        if self._mode != "mean":
            return
        for layer, kept in self._kept.items():
            amap = kept.map()
            count, mean = self._means.get(layer, (0, amap))
            if count and amap is mean:
                continue  # it was folded before
            if amap.shape != mean.shape:
                raise ValueError(
                    f"calls='mean': expected maps of one shape; {layer} has {list(mean.shape)}, then "
                    f"{list(amap.shape)}; use calls='all'"
                )
            self._means[layer] = count + 1, torch.lerp(mean, amap, 1 / (count + 1)) if count else amap
        # In the order of the layers, whichever attended in this pass; the same dict, which the call's own trace has.
        self._kept.clear()
        self._kept.update({layer: MapRecord(mean) for layer, (_, mean) in self._means.items()})

    def sides(self, layer: str | int) -> tuple[Tokens, Tokens]:
        """(queries, keys): the tokens that the rows and the columns of a layer's map stand for.

        Raises:
            KeyError: no such layer was captured.

        Example:
            >>> trace.sides("vision_model.encoder.layers.0.self_attn")[1].grid  # doctest: +SKIP
            (14, 14)
        """
        kept = self.kept(layer)
        name = list(self._kept)[layer] if isinstance(layer, int) else layer
        if name not in self._sides:
            self._sides[name] = self._find_sides(name, kept)
        return self._sides[name]

    def _find_sides(self, name: str, kept: LayerRecord) -> tuple[Tokens, Tokens]:
        facts = self._facts.get(name) or self._known.get(name.partition("#")[0], Facts())
        size = self._queries.get(name, kept.shape[-2 if self.rows is None else -1]), kept.shape[-1]
        queries, keys = sides(self._structure(), name, size, facts, self._grids)
        if self._layout is not None and keys.count == self._layout.tokens and keys.kind in ("image", "tokens"):
            given = of_layout(self._layout, keys.part)
            return (given if queries == keys else queries), given
        return queries, keys

    @property
    def given_layout(self) -> TokenLayout | None:
        """The layout that the capture was given, if any."""
        return self._layout

    def _structure(self) -> Parts:
        names = tuple(dict.fromkeys(name.partition("#")[0] for name in self._kept))
        if names not in self._parts:
            self._parts[names] = Parts(self._model, names)
        return self._parts[names]

    @property
    def layout(self) -> TokenLayout:
        """The tokens of the maps' columns, from the model and its actual input, or as given to `capture`.

        Raises:
            ValueError: the layers have different ones (names them), or the model doesn't say; pass `layout=`.
        """
        if self._layout is not None and not self._kept:
            return self._layout
        if not self._kept:
            raise ValueError("layout: no layer was captured yet")
        keys = {self.sides(layer)[1]: layer for layer in self._kept}
        if len(keys) > 1:
            raise ValueError(
                f"layout: expected layers over the same tokens; got {describe(self)}; choose layers= of one kind"
            )
        return self.layout_of(next(iter(keys.values())))

    def layout_of(self, layer: str | int) -> TokenLayout:
        """The tokens of one layer's columns.

        Raises:
            KeyError: no such layer was captured. ValueError: the model doesn't say; pass `layout=`.
        """
        keys = self.sides(layer)[1]
        if keys.kind in ("text", "channels"):
            raise ValueError(f"layout: expected maps over patches of an image; got maps over {keys}")
        found = self._layout or keys.layout
        if found is not None:
            return found
        parts = self._structure()
        own = parts.kinds.get(keys.part, {})
        grids = [grid for name, grid in self._grids.items() if name in own]
        return infer_layout(parts.modules.get(keys.part, self._model), grids, keys.count)


class Calls(Sequence[Trace]):
    """The passes of a capture: `calls[i]` is the Trace of pass i, `calls[name]` {i: map} of a layer's every pass."""

    def __init__(self, calls: Sequence[Trace]) -> None:
        self._calls = tuple(calls)

    @overload
    def __getitem__(self, which: int) -> Trace: ...
    @overload
    def __getitem__(self, which: slice) -> "Calls": ...
    @overload
    def __getitem__(self, which: str) -> dict[int, Tensor]: ...
    def __getitem__(self, which: int | slice | str) -> "Trace | Calls | dict[int, Tensor]":
        if isinstance(which, slice):
            return Calls(self._calls[which])
        if isinstance(which, str):
            found = {i: call[which] for i, call in enumerate(self._calls) if which in call}
            if not found:
                known = ", ".join(dict.fromkeys(name for call in self._calls for name in call)) or "none"
                raise KeyError(f"layer {which!r}: expected one of {known}")
            return found
        return self._calls[which]

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"Calls({', '.join(map(repr, self._calls))})"


def describe(trace: Trace, by_stack: bool = False) -> str:
    """A trace's layers in words, grouped by the tokens of their maps: "12 text of text_model: text_model.layers.0"."""
    told_of: dict[tuple[str, str], list[str]] = {}
    for layer in trace:
        queries, keys = trace.sides(layer)
        what = f"{queries} over {keys}" if queries != keys else f"{keys}"
        told_of.setdefault((what, stack_of(layer) if by_stack else ""), []).append(layer)
    told = [
        f"{what}: {names[0]}" + (f" ... {names[-1]} ({len(names)} layers)" if len(names) > 1 else "")
        for (what, _), names in told_of.items()
    ]
    return "; ".join(told)


def _names(pattern: str, layer: str) -> bool:
    """True if a pattern selects a layer: by name, glob or block, with or without the number of its call."""
    return matches(pattern, layer) or matches(pattern, layer.partition("#")[0])
