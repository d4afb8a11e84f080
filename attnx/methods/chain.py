"""The layers of a trace that form a chain of self-attention."""

import re
from dataclasses import dataclass
from functools import cached_property

from attnx.trace.gradient_record import GradientRecord
from attnx.trace.layers import matches, selects
from attnx.trace.layout import TokenLayout
from attnx.trace.records import LayerRecord
from attnx.trace.tokens import Tokens, describe, stack_of
from attnx.trace.trace import Trace
from attnx.trace.window_record import PatchMerge, WindowRecord
from attnx.trace.windows import Pair


@dataclass(frozen=True)
class Chain:
    """The layers of a trace that follow one another.

    Attributes:
        steps: (name, record) of the self-attention layers in order; between them, the mergings of patches.
        pool: (name, record) of a final pooling layer [1, N]; None if there is none.
        grids: grid of each self-attention layer, if some attend in windows; else empty.
    """

    steps: list[tuple[str, LayerRecord | PatchMerge]]
    pool: tuple[str, LayerRecord] | None = None
    grids: tuple[Pair, ...] = ()

    @property
    def windowed(self) -> bool:
        """True if some layers attend in windows."""
        return bool(self.grids)

    @cached_property
    def layers(self) -> list[tuple[str, LayerRecord]]:
        """(name, record) of the self-attention layers."""
        return [(name, record) for name, record in self.steps if not isinstance(record, PatchMerge)]

    def layout(self, trace: Trace, start: int = 0, query: str | int | None = None) -> TokenLayout | None:
        """Layout of the tokens of self-attention layer `start`; None if none is needed: query="all", or text.

        Raises:
            ValueError: the model does not declare it, the capture's `layout` contradicts the grid of the windows, or
                there is no query of a text.
        """
        if query == "all":
            return None
        layer = self.layers[start][0]
        tokens = trace.sides(layer)[1]
        if tokens.kind == "text" and trace.tokens.given is None:
            if query is None:
                raise ValueError(
                    f"query: expected a token of the text, such as 0 or -1, 'mean' or 'all', for layers over {tokens}; "
                    "got None"
                )
            return None
        if not self.windowed:
            return trace.layout_of(layer)
        layout, given = TokenLayout(0, self.grids[start]), trace.tokens.given
        if given is not None and (given.prefix, given.grid, given.suffix) != (0, layout.grid, 0):
            raise ValueError(f"layout: expected None or that of the windows, {layout}; got {given}")
        return layout

    def since(self, start: int) -> list[tuple[str, LayerRecord | PatchMerge]]:
        """The steps from self-attention layer `start` on."""
        return self.steps[self.steps.index(self.layers[start]) :]


def self_attention(trace: Trace, weighted: bool = False) -> Chain:
    """The self-attention layers of a trace, and a final pooling layer, as a chain.

    Args:
        trace: a capture of all rows.
        weighted: True if the maps are weighted by gradients, so that their rows do not sum to 1.

    Raises:
        ValueError: the layers do not follow one another, have different tokens, or one of them has no map.
    """
    _check_rows(trace)
    _check_order(trace)
    if any(trace.windows(name) is not None for name in trace):
        return _windowed(trace, weighted)
    layers: list[tuple[str, LayerRecord]] = []
    pool: tuple[str, LayerRecord] | None = None
    rows: set[tuple[Tokens, str]] = set()
    fits = True
    for name in trace:
        record = trace.kept(name)
        queries, keys = trace.sides(name)
        if queries == keys and keys.kind not in ("channels", "windows") and pool is None:
            layers.append((name, record))
            rows.add((keys, "" if trace.in_a_row else stack_of(name)))
        elif record.shape[-2] == 1 and pool is None and layers and keys == trace.sides(layers[-1][0])[1]:
            pool = name, record
        else:
            fits = False
    if trace.tokens.given is not None:
        n = trace.tokens.given.tokens
        odd = next((name for name in trace if trace.kept(name).shape[-1] != n), None)
        if odd is not None:
            raise ValueError(
                f"layers: expected maps of {n} x {n} tokens; got {list(trace.kept(odd).shape[-2:])} from {odd}; "
                "choose layers= of one self-attention stack"
            )
    if not fits or len(rows) > 1:
        raise ValueError(
            "layers: expected self-attention layers over the same tokens, one after the other; got "
            f"{describe(trace.all_sides(), by_stack=True)}; {_choice(trace)}"
        )
    if not layers:
        raise ValueError("layers: expected at least one self-attention layer in the trace; got none")
    _check_mixing(trace, layers[0][0], layers[-1][0])
    return Chain(list(layers), pool)


def _check_rows(trace: Trace) -> None:
    """Raise ValueError unless the trace has whole maps of layers that attend once in a pass."""
    if trace.rows is not None:
        raise ValueError(f"rows: expected a capture of whole maps, with rows=None; got rows={list(trace.rows)}")
    again = next((name for name in trace if "#" in name), None)
    if again is not None:
        first = again.partition("#")[0] or "the model itself"
        raise ValueError(f"layers: expected layers in a row; {first} attends more than once in a pass ({again})")


def _check_order(trace: Trace) -> None:
    """Raise ValueError if layers ran side by side, or without a map."""
    beside = _side_by_side(trace)
    if beside is not None:
        raise ValueError(
            f"layers: expected layers in a row; {beside[1]} runs beside {beside[0]}: both have the same input; "
            "choose layers= of one"
        )
    gaps = _gaps(trace)
    if gaps:
        others = [name for name in trace if stack_of(name) == stack_of(gaps[0])]
        raise ValueError(
            f"layers: expected a map of every layer; {', '.join(gaps)} ran without one, so the chain would skip it: "
            "write an adapter (docs/adding-a-model.md), or, if it is not part of the chain, choose the others by "
            f"layers={others}"
        )


def _side_by_side(trace: Trace) -> tuple[str, str] | None:
    """Two modules that have layers in the trace and had the same input; None if there are none."""
    for pair in trace.tokens.beside:
        if all(any(matches(module, name.partition("#")[0]) for name in trace) for module in pair):
            return pair
    return None


def _gaps(trace: Trace) -> list[str]:
    """Names of attention layers that ran without a map, beside layers of the trace in the same stack of blocks."""
    maps = {name.partition("#")[0] for name in trace}
    without = [name for name in trace.tokens.attending if name in trace.tokens.ran and name not in maps]
    stacks = {stack_of(name) for name in maps} if without else set()
    return [
        name
        for name in without
        if stack_of(name) in stacks and not any(matches(other, name) or matches(name, other) for other in maps)
    ]


def _check_mixing(trace: Trace, first: str, last: str) -> None:
    """Raise ValueError if something else than attention mixes tokens between two layers."""
    mixed = trace.tokens.mixes(first, last)
    if mixed is not None:
        raise ValueError(
            f"layers: expected layers between which only attention mixes tokens; {mixed} may mix neighbouring tokens "
            f"between {first} and {last}; choose layers= on one side of it"
        )


def _check_stack(trace: Trace, first: str, last: str) -> None:
    """Raise ValueError if two layers with windows are of different parts of a model, such as two towers."""
    # The name up to the number of the block, with all numbers alike.
    names = [re.sub(r"\d+", "#", name).rpartition("#")[0] for name in (first, last)]
    parts = [trace.sides(name)[1].part for name in (first, last)]
    if not trace.in_a_row and (names[0] != names[1] or parts[0] != parts[1]):
        raise ValueError(
            f"layers: expected layers with windows of one stack; got {first} and {last}; choose layers= of one"
        )


def _windowed(trace: Trace, weighted: bool) -> Chain:
    """The chain of a model with windows: maps of the windows, and the mergings of patches between the stages.

    Raises:
        ValueError: a layer over other tokens than a grid of the image, or grids that no merging connects.
    """
    steps: list[tuple[str, LayerRecord | PatchMerge]] = []
    grids: list[Pair] = []
    before: tuple[str, Pair] | None = None
    # A layer over as many tokens as the windows of another is over the same grid.
    known = {windows.tokens: windows.grid for name in trace if (windows := trace.windows(name)) is not None}
    for name in trace:
        record, windows, (queries, keys) = trace.kept(name), trace.windows(name), trace.sides(name)
        grid = keys.grid or (known.get(keys.count) if keys.kind == "image" else None)
        if grid is None or queries != keys or keys.prefix or keys.suffix or keys.frames > 1:
            raise ValueError(
                "layers: expected layers over the windows of a grid, or over the whole grid; got "
                f"{describe(trace.all_sides(), by_stack=True)}; choose layers= among these"
            )
        if before is not None:
            _check_mixing(trace, before[0], name)
            _check_stack(trace, before[0], name)
            merges = trace.tokens.merges(before[0], name)
            if (merges, grid) == (1, PatchMerge.half(before[1])):
                steps.append((name, PatchMerge(before[1], grid)))
            elif (merges, grid) != (0, before[1]):
                raise ValueError(
                    f"layers: expected the grid {before[1]} of {before[0]}, or half of it after one patch merging; "
                    f"got {grid} in {name} after {merges} mergings"
                )
        renormalise = not weighted and not isinstance(record, GradientRecord)
        steps.append((name, record if windows is None else WindowRecord(record, windows, renormalise=renormalise)))
        grids.append(grid)
        before = name, grid
    return Chain(steps, grids=tuple(grids))


def _choice(trace: Trace) -> str:
    """Advice on layers of the trace that `rollout` accepts, for error messages."""
    square = [name for name in trace if trace.sides(name)[0] == trace.sides(name)[1]]
    square = [name for name in square if trace.sides(name)[1].kind not in ("channels", "windows")]
    images = [name for name in square if trace.sides(name)[1].grid] or square
    if not images:
        return "no layers of this model form a chain"
    kind, stem = trace.sides(images[-1])[1], stack_of(images[-1])
    part = [name for name in trace if selects(f"{kind.part}.*", name)] if kind.part else []
    if part and all(trace.sides(name) == (kind, kind) for name in part):
        return f"use model.{kind.part}, or layers='{kind.part}.*'"
    group = [name for name in square if trace.sides(name)[1] == kind and stack_of(name) == stem]
    if trace.tokens.mixes(group[0], group[-1]) is not None:
        return "no layers of this model form a chain: convolutions or pools run between them"
    for pattern in (f"{stem}.*", f"{stem}*", f"{stem}.*{group[0].rpartition('.')[2]}"):
        if stem and {name for name in trace if selects(pattern, name)} == set(group):
            return f"choose some of one kind, such as layers={pattern!r}"
    return f"choose some of one kind, such as layers={group}"
