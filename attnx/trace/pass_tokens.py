"""The tokens of the maps of one pass, from the model, the grids of its patches, and facts about its attention calls."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from attnx.trace.branch_layers import BranchLayer, branch_layer
from attnx.trace.facts import Facts
from attnx.trace.grids import Grid
from attnx.trace.layers import attending_names
from attnx.trace.layout import TokenLayout, infer_layout
from attnx.trace.parts import Parts
from attnx.trace.row_stats import PlacesCache
from attnx.trace.sides import sides
from attnx.trace.structure import Structure, structure_of
from attnx.trace.tokens import Tokens, of_layout
from attnx.trace.windows import Windows

__all__ = ["PassTokens"]

_NO_FACTS = Facts()


class PassTokens:
    """The tokens of the maps of one pass.

    Attributes:
        given: the `layout` argument of the capture.
        places: places of the tokens of layers, see `attnx.trace.row_stats.wanted_of`.
        beside: pairs of modules that had the same input.
        structure: of the model, the same in all passes of a capture.
        ran: names of the attention modules that ran, with or without a map.
    """

    def __init__(self, model: nn.Module, given: TokenLayout | None) -> None:
        self.model = model
        self.given = given
        self.beside: list[tuple[str, str]] = []
        self.ran: set[str] = set()
        # The dict is replaced, not changed: layers share it.
        self._grids: dict[str, Grid] = {}
        self._before: dict[str, dict[str, Grid]] = {}  # {layer: grids of the modules that ran before it}
        self._mixing: list[str] = []  # what mixes tokens besides attention, in the order of the calls
        self._place: dict[str, int] = {}  # {layer: number of those calls before it}
        self._queries: dict[str, int] = {}
        self._facts: dict[str, Facts] = {}
        self._sides: dict[str, tuple[Tokens, Tokens]] = {}
        # Facts, parts, places and sides that hold for every pass; sides with what they were found from.
        self.places: PlacesCache = {}
        self._known: dict[str, Facts] = {}
        self._parts: dict[tuple[str, ...], Parts] = {}
        self._found: dict[str, tuple[tuple[Any, ...], tuple[Tokens, Tokens]]] = {}
        self.structure: Structure | None = None

    def copy(self) -> "PassTokens":
        """A copy for another trace of the same pass."""
        other = self.next_pass()
        other._grids, other._queries, other._facts = dict(self._grids), dict(self._queries), dict(self._facts)
        other._before, other._mixing, other._place = dict(self._before), list(self._mixing), dict(self._place)
        other.beside, other.ran = list(self.beside), set(self.ran)
        return other

    def next_pass(self) -> "PassTokens":
        """The tokens of a new pass: only facts, parts and places that hold for every pass are kept."""
        other = PassTokens(self.model, self.given)
        other._known, other._parts, other.places, other._found = self._known, self._parts, self.places, self._found
        other.structure = self.structure
        return other

    def item(self, index: int, queries: Mapping[str, int]) -> "PassTokens":
        """The tokens of one item of the batch; `queries`: number of queries of the layers that had padding."""
        other = self.copy()
        other._queries |= queries
        other._grids = {name: grid.of_item(index) for name, grid in self._grids.items()}
        other._before = {
            layer: {name: grid.of_item(index) for name, grid in grids.items()} for layer, grids in self._before.items()
        }
        return other

    def grids_of_items(self, layer: str, keys: Tokens, layers: Collection[str]) -> tuple[tuple[int, int], ...] | None:
        """The grid of each image among the padded keys of a layer; None if there is no padding."""
        if keys.kind not in ("image", "tokens"):
            return None
        parts = self._structure(layers)
        grids = parts.grids(keys.part, self._before.get(layer, self._grids), self._facts_of(layer).width)
        return next((grid.each for grid in grids if grid.each), None)

    def unpadded(self, layer: str, keys: Tokens, index: int, layers: Collection[str]) -> int | None:
        """Number of tokens of one image among the padded keys of a layer; None if there is no padding."""
        each = self.grids_of_items(layer, keys, layers)
        return None if each is None else each[index][0] * each[index][1]

    def add(self, layer: str, queries: int | None) -> None:
        """Store the number of queries of a layer, if given. The layer's map is new, so its tokens are found again."""
        self._sides.pop(layer, None)
        self._before[layer] = self._grids
        self._place[layer] = len(self._mixing)
        if queries is not None:
            self._queries[layer] = queries

    def note(self, layer: str, facts: Facts) -> None:
        """Store facts about the sides of a layer's map; they hold for later passes without facts, too."""
        self._facts[layer] = self._known[layer.partition("#")[0]] = facts

    def note_mixing(self, module: str) -> None:
        """Store that a convolution or pool over several positions, or a recurrent network, ran."""
        self._mixing.append(module)

    def add_grid(self, module: str, grid: Grid) -> None:
        """Store the grid of a module's output; the newest grid comes first."""
        self._grids = {module: grid} | {name: other for name, other in self._grids.items() if name != module}

    @property
    def attending(self) -> Sequence[str]:
        """Names of the model's attention layers in the order of its modules."""
        return self._of_model().derived(attending_names)

    def branch(self, layer: str) -> BranchLayer | None:
        """The place of a layer in a CrossViT; None for a layer of another model."""
        return branch_layer(self._structure([layer]).modules, layer.partition("#")[0])

    def windows(self, layer: str) -> Windows | None:
        """The windows of a layer; None if it attends in none, or in windows that are not known."""
        return self._facts_of(layer).windows

    def depends_on_size(self, layer: str) -> bool:
        """True if facts about a layer hold for images of one size: its windows, or the sides of its feature map."""
        facts = self._facts_of(layer)
        return facts.windows is not None or bool(facts.layouts)

    def merges(self, first: str, last: str) -> int:
        """Number of patch mergings that ran between two layers."""
        return self.merges_before(last) - self.merges_before(first)

    def merges_before(self, layer: str) -> int:
        """Number of patch mergings that ran before a layer."""
        return self._facts_of(layer).merges

    @property
    def mixing(self) -> tuple[str, ...]:
        """Names of the modules and functions that mix tokens besides attention, in the order of the calls."""
        return tuple(self._mixing)

    def place(self, layer: str) -> int:
        """Number of calls in `mixing` that ran before a layer."""
        return self._place.get(layer, 0)

    def mixes(self, first: str, last: str) -> str | None:
        """Name of what `note_mixing` stored between two layers, outside attention layers; None if there is nothing."""
        between = self._mixing[self._place.get(first, 0) : self._place.get(last, 0)]
        inside = tuple(f"{layer}." for layer in self._place)
        return next((name for name in between if not name.startswith(inside)), None)

    def sides(self, name: str, shape: tuple[int, int, int], layers: Collection[str]) -> tuple[Tokens, Tokens]:
        """(queries, keys): the tokens that the rows and the columns of a layer's map stand for.

        Args:
            shape: number of maps, of queries, unless that is stored, and of keys.
            layers: names of all layers of the trace.
        """
        if name not in self._sides:
            self._sides[name] = self._find_sides(name, shape, layers)
        return self._sides[name]

    def layout(self, name: str, keys: Tokens, layers: Collection[str]) -> TokenLayout:
        """Token layout of the keys of a layer over an image.

        Args:
            name: of the layer.
            keys: its keys, as `sides` returns them.
            layers: names of all layers of the trace.

        Raises:
            ValueError: the keys are not patches of an image, or the model does not declare its layout.
        """
        if keys.kind == "windows":
            raise ValueError(
                f"layout: expected maps over whole images; got {keys} in {name!r}; rollout follows windows, but there "
                "is no class token"
            )
        if keys.kind in ("text", "channels", "queries"):
            raise ValueError(
                f"layout: expected maps over patches of an image; got maps over {keys} in {name!r}; "
                "trace[layer] has the whole map"
            )
        layout = self.given or keys.layout
        if layout is not None:
            return layout
        parts = self._structure(layers)
        grids = parts.grids(keys.part, self._before.get(name, self._grids), self._facts_of(name).width)
        return infer_layout(parts.modules.get(keys.part, self.model), grids, keys.count)

    def patch_size(self, name: str, tokens: Tokens, layers: Collection[str]) -> tuple[float, float] | None:
        """(height, width) in pixels from one token of a grid to the next; None if unknown.

        A pixel is one of what the first convolution of the layer's part, or of the model, sees, if that is an image.

        Args:
            name: of the layer.
            tokens: of one side of its map.
            layers: names of all layers of the trace.
        """
        grids, sources = self._before.get(name, self._grids), self._structure(layers).sources
        oldest = [(sources.get(module), grid) for module, grid in reversed(grids.items())]
        first = [grid for part, grid in oldest if part == tokens.part][:1] + [grid for _, grid in oldest][:1]
        seen = next((grid for grid in first if min(grid.image) and min(grid.step)), None)
        if seen is None or tokens.grid is None:
            return None
        height, width = map(_pixels, seen.image, seen.step, seen.shape, tokens.grid)
        return None if height is None or width is None else (height, width)

    def _find_sides(self, name: str, shape: tuple[int, int, int], layers: Collection[str]) -> tuple[Tokens, Tokens]:
        size = shape[0], self._queries.get(name, shape[1]), shape[2]
        inputs = self._structure(layers), size, self._facts_of(name), self._before.get(name, self._grids)
        found = self._found.get(name)
        if found is None or found[0] != inputs:
            parts, size, facts, grids = inputs
            found = self._found[name] = inputs, sides(parts, name, size, facts, grids)
        queries, keys = found[1]
        if self.given is not None and keys.count == self.given.tokens and keys.kind in ("image", "tokens"):
            given = of_layout(self.given, keys.part)
            return (given if queries == keys else queries), given
        return queries, keys

    def _facts_of(self, name: str) -> Facts:
        return self._facts.get(name) or self._known.get(name.partition("#")[0], _NO_FACTS)

    def _of_model(self) -> Structure:
        if self.structure is None:
            self.structure = structure_of(self.model)
        return self.structure

    def _structure(self, layers: Collection[str]) -> Parts:
        structure = self._of_model()
        known, names = structure.derived(_attending), tuple[str, ...]()
        if not known.issuperset(layers):
            names = tuple(dict.fromkeys([name for layer in layers if (name := layer.partition("#")[0]) not in known]))
        if names not in self._parts:
            self._parts[names] = structure.derived(Parts, names).for_one_trace()
        return self._parts[names]


def _attending(structure: Structure) -> frozenset[str]:
    return frozenset(structure.derived(attending_names))


def _pixels(image: int, step: int, first: int, count: int) -> float | None:
    """Pixels from cell to cell along an axis of a grid; None if several numbers are possible.

    A whole multiple of the first convolution's step that gives `count` cells, in rounding up or down; several halvings
    round like one division. Powers of two are preferred. Without such a multiple, the model has resized the image.

    Args:
        image: pixels of the axis.
        step: of the first convolution.
        first: cells of its output.
        count: cells of the grid.
    """
    if count == first:
        return step
    multiples = [m for m in range(1, image // step + 2) if count in (image // (m * step), -(-image // (m * step)))]
    found = [m for m in multiples if m & (m - 1) == 0] or multiples
    if len(found) > 1 and count > 1:
        return None
    return found[0] * step if found else image / count
