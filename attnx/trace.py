"""What a capture gives: the maps of one forward pass, and the layout of their tokens."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from attnx.kept import Kept, KeptMap
from attnx.layout import TokenLayout, infer_layout
from attnx.weighted import KeptGradient


class Trace(Mapping[str, Tensor]):
    """The maps of one forward pass: layer name -> float32 map, in the order of the calls.

    A map is [B, M, N]; [B, R, N] for R chosen rows; [B, H, M, N] for heads="each". `trace[-1]` is the last layer's.
    A layer that attends twice in one pass appears a second time as "name#2". A new pass replaces the last one's maps.
    Of a layer that was captured with keep="qk" the map is made when it is read, every time; `kept` gives the rest.
    """

    def __init__(self, model: nn.Module, heads: str, rows: tuple[int, ...] | None, layout: TokenLayout | None) -> None:
        self.heads = heads
        self.rows = rows
        self._model = model
        self._layout = layout
        self._kept: dict[str, Kept] = {}
        self._grids: list[tuple[int, int]] = []

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

    def kept(self, layer: str | int) -> Kept:
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
            raise KeyError(f"layer {layer!r}: expected one of {', '.join(self._kept) or 'none (nothing was heard)'}")
        return self._kept[layer]

    def add(self, layer: str, kept: Tensor | Kept) -> None:
        """Keeps a layer's map, or what it is made of."""
        self._kept[layer] = KeptMap(kept) if isinstance(kept, Tensor) else kept

    def backward(self, score: Tensor, retain_graph: bool = False) -> None:
        """Has a capture with `grad` make its maps: those of the gradient of `score`. No parameter gets a gradient.

        Args:
            score: one number, such as a class's logits summed over the batch: each item's map is then its own.
            retain_graph: another backward pass of the same forward pass will follow.

        Raises:
            ValueError: the capture has no `grad`, or the score does not depend on any captured layer.
        """
        outs = [kept.out for kept in self._kept.values() if isinstance(kept, KeptGradient) and kept.out is not None]
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
                if isinstance(kept, KeptGradient):
                    kept.out = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Trace":
        """The same with each map, as it is now, replaced by what the function makes of it."""
        other = Trace(self._model, self.heads, self.rows, self._layout)
        other._grids = list(self._grids)
        for layer, kept in self._kept.items():
            other.add(layer, function(kept.map()))
        return other

    def add_grid(self, grid: tuple[int, int]) -> None:
        """Keeps a grid (rows, columns) that a patch convolution gave; the newest stands first."""
        if grid in self._grids:
            self._grids.remove(grid)
        self._grids.insert(0, grid)

    def clear(self) -> None:
        """Forgets the last pass."""
        self._kept.clear()
        self._grids.clear()

    @property
    def layout(self) -> TokenLayout:
        """The tokens of the maps, from the model and its actual input, or as given to `capture`.

        Raises:
            ValueError: the model doesn't say; pass `layout=`.
        """
        if self._layout is not None:
            return self._layout
        if not self._kept:
            raise ValueError("layout: the model has not been called yet")
        counts = [kept.shape[-1] for kept in self._kept.values()]
        return infer_layout(self._model, self._grids, max(set(counts), key=counts.count))
