"""The tokens that the rows and columns of a trace's maps stand for: the part of `Trace` that reads `PassTokens`."""

from collections.abc import Mapping

from torch import Tensor

from attnx.trace.layout import TokenLayout
from attnx.trace.pass_tokens import PassTokens
from attnx.trace.records import LayerRecord
from attnx.trace.tokens import Tokens, describe
from attnx.trace.windows import Windows


class LayerTokens(Mapping[str, Tensor]):
    """A mapping {layer: map} whose layers have tokens.

    Attributes:
        rows: indices of the captured queries; None: all.
        tokens: of the current pass.
    """

    rows: tuple[int, ...] | None
    tokens: PassTokens
    _records: dict[str, LayerRecord]

    def kept(self, layer: str | int) -> LayerRecord:
        """The record of a layer."""
        raise NotImplementedError

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
                f"layout: expected layers over the same tokens; got {describe(self.all_sides())}; {self._one_kind()}"
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

    def _one_kind(self) -> str:
        """Advice on layers over the same patches, for an error message."""
        images = [keys for _, keys in self.all_sides().values() if keys.grid is not None and keys.part]
        part = images[-1].part if images else ""
        inside = {self.sides(name) for name in self if name.startswith(f"{part}.")}
        if part and len(inside) == 1:
            return f"use model.{part}, or layers='{part}.*'"
        return "choose layers= of one kind"

    def _name(self, layer: str | int) -> str:
        """Name of a layer that was captured."""
        return list(self._records)[layer] if isinstance(layer, int) else layer
