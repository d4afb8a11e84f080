"""What a capture keeps: the maps of one forward pass, and the layout of their tokens."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from attnx.layout import TokenLayout, infer_layout


class Trace(Mapping[str, Tensor]):
    """The maps of one forward pass: layer name -> float32 map, in the order of the calls.

    A map is [B, M, N]; [B, R, N] for R chosen rows; [B, H, M, N] for heads="each". `trace[-1]` is the last layer's.
    A layer that attends twice in one pass appears a second time as "name#2". A new pass replaces the last one's maps.
    """

    def __init__(self, model: nn.Module, heads: str, rows: tuple[int, ...] | None, layout: TokenLayout | None) -> None:
        self.heads = heads
        self.rows = rows
        self._model = model
        self._layout = layout
        self._maps: dict[str, Tensor] = {}
        self._grids: list[tuple[int, int]] = []

    def __getitem__(self, layer: str | int) -> Tensor:
        if isinstance(layer, int):
            names = list(self._maps)
            if not -len(names) <= layer < len(names):
                raise KeyError(f"layer {layer}: expected an index into {len(names)} layers: {', '.join(names)}")
            layer = names[layer]
        if layer not in self._maps:
            raise KeyError(f"layer {layer!r}: expected one of {', '.join(self._maps) or 'none (nothing was heard)'}")
        return self._maps[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(m.shape)}" for name, m in self.items())
        return f"Trace(heads={self.heads!r}, {{{shapes}}})"

    def add(self, layer: str, amap: Tensor) -> None:
        """Keeps a layer's map."""
        self._maps[layer] = amap

    def add_grid(self, grid: tuple[int, int]) -> None:
        """Keeps a grid (rows, columns) that a patch convolution gave; the newest stands first."""
        if grid in self._grids:
            self._grids.remove(grid)
        self._grids.insert(0, grid)

    def clear(self) -> None:
        """Forgets the last pass."""
        self._maps.clear()
        self._grids.clear()

    @property
    def layout(self) -> TokenLayout:
        """The tokens of the maps, from the model and its actual input, or as given to `capture`.

        Raises:
            ValueError: the model doesn't say; pass `layout=`.
        """
        if self._layout is not None:
            return self._layout
        if not self._maps:
            raise ValueError("layout: the model has not been called yet")
        counts = [m.shape[-1] for m in self._maps.values()]
        return infer_layout(self._model, self._grids, max(set(counts), key=counts.count))
