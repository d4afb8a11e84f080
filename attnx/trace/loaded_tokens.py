"""The tokens of a trace that was read from a file, without its model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from attnx.trace.branch_layers import BranchLayer
from attnx.trace.layout import TokenLayout
from attnx.trace.pass_tokens import PassTokens
from attnx.trace.tokens import Tokens
from attnx.trace.windows import Pair, Windows


@dataclass(frozen=True)
class LayerFacts:
    """The answers of `PassTokens` about a layer when its trace was saved.

    Attributes:
        queries, keys: its tokens.
        problem: the reason that it has no layout; "" if it has one.
        merges, place: numbers of patch mergings, and of other mixings, before it.
        windows, branch: as of `PassTokens`.
        patch_size: of the queries and of the keys.
        each: the grid of each image, if the images are padded.
    """

    queries: Tokens
    keys: Tokens
    problem: str
    merges: int
    place: int
    windows: Windows | None
    branch: BranchLayer | None
    patch_size: tuple[tuple[float, float] | None, ...]
    each: tuple[Pair, ...] | None


class LoadedTokens(PassTokens):
    """`PassTokens` that answers from stored facts, since there is no model to ask."""

    def __init__(
        self,
        given: TokenLayout | None,
        layers: Mapping[str, LayerFacts],
        attending: Sequence[str],
        mixing: Sequence[str],
    ) -> None:
        super().__init__(nn.Module(), given)
        self._layers, self._attending = dict(layers), tuple(attending)
        self._mixing = list(mixing)
        self._place = {name: facts.place for name, facts in layers.items()}

    @property
    def attending(self) -> Sequence[str]:
        """Names of the model's attention layers in the order of its modules."""
        return self._attending

    def next_pass(self) -> "LoadedTokens":
        """The same tokens: there is no further pass."""
        other = LoadedTokens(self.given, self._layers, self._attending, self._mixing)
        other.places = self.places
        return other

    def item(self, index: int, queries: Mapping[str, int]) -> PassTokens:
        """The tokens of one item of the batch.

        Raises:
            ValueError: the images are padded to one size, so each has a grid of its own.
        """
        padded = next((name for name, facts in self._layers.items() if facts.each is not None), None)
        if padded is not None:
            raise ValueError(
                f"item: expected images of one grid in a loaded trace; got padded ones in {padded}; save items"
            )
        return self.copy()

    def add(self, layer: str, queries: int | None) -> None:
        """Do nothing: the tokens of every layer are stored."""

    def branch(self, layer: str) -> BranchLayer | None:
        """The place of a layer in a CrossViT; None for a layer of another model."""
        return self._layers[layer].branch

    def windows(self, layer: str) -> Windows | None:
        """The windows of a layer; None if it attends in none, or in windows that are not known."""
        return self._layers[layer].windows

    def merges_before(self, layer: str) -> int:
        """Number of patch mergings that ran before a layer."""
        return self._layers[layer].merges

    def grids_of_items(self, layer: str, keys: Tokens, layers: Iterable[str]) -> tuple[Pair, ...] | None:
        """The grid of each image among the padded keys of a layer; None if there is no padding."""
        return self._layers[layer].each

    def sides(self, name: str, shape: tuple[int, int, int], layers: Iterable[str]) -> tuple[Tokens, Tokens]:
        """(queries, keys) of a layer."""
        return self._layers[name].queries, self._layers[name].keys

    def layout(self, name: str, keys: Tokens, layers: Iterable[str]) -> TokenLayout:
        """Token layout of the keys of a layer over an image. Raises ValueError as when the trace was saved."""
        problem, layout = self._layers[name].problem, self.given or keys.layout
        if problem or layout is None:
            raise ValueError(problem or f"layout: expected maps over patches of an image; got maps over {keys}")
        return layout

    def patch_size(self, name: str, tokens: Tokens, layers: Iterable[str]) -> tuple[float, float] | None:
        """(height, width) in pixels from one token of a grid to the next; None if unknown."""
        facts = self._layers[name]
        return facts.patch_size[0 if tokens == facts.queries else 1]
