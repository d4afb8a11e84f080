"""The token of a request, found in one picture."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnx.extract.place import Place, layout_of_tokens
from attnx.methods.maps import index_of
from attnx.trace.capture import capture
from attnx.trace.layers import Layers
from attnx.trace.layout import TokenLayout

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.loaded import Loaded

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class FoundToken:
    """A token of a picture.

    Attributes:
        index: the token among those of `layout`, not negative.
        layer: the last layer over patches, or over windows.
        layout: the tokens of that layer.
        windows: True if the layer attends in windows.
        alike: the layers with the same tokens.
    """

    index: int
    layer: str
    layout: TokenLayout
    windows: bool
    alike: list[str | int]

    @property
    def name(self) -> str:
        """The token in words: its index, and the row and column of a patch."""
        if self._cell is None:
            return f"token {self.index}"
        row, column = self._cell
        return f"token {self.index} (the patch in row {row}, column {column})"

    @property
    def box(self) -> Box | None:
        """The patch in shares of the picture; None for another token."""
        if self._cell is None:
            return None
        (rows, columns), (row, column) = self.layout.grid, self._cell
        return column / columns, row / rows, (column + 1) / columns, (row + 1) / rows

    @property
    def _cell(self) -> tuple[int, int] | None:
        at, (rows, columns) = self.index - self.layout.prefix, self.layout.grid
        return divmod(at % (rows * columns), columns) if 0 <= at < self.layout.patch_count else None


def find_token(place: Place, picture: "Image", loaded: "Loaded", images: Tensor, layers: Layers) -> FoundToken:
    """The token at a place of a picture, in the last of the layers over patches, or over windows.

    Raises:
        ValueError: there is no such layer, or no such token.
    """
    with torch.inference_mode(), capture(loaded.model, layers, rows=0) as trace:
        loaded.model(images, **loaded.model_kwargs)
    layer, layout = layout_of_tokens(trace)
    index = index_of(place.token(layout, (picture.height, picture.width)), layout.tokens, layer)
    # A pooling layer, or one of another stage, has other queries.
    alike: list[str | int] = [name for name in trace if trace.sides(name) == trace.sides(layer) and "#" not in name]
    return FoundToken(index, layer, layout, trace.windows(layer) is not None, alike)
