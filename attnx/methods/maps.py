"""Maps of the class token: in one layer, or in every layer of a trace."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnx.ops.checks import in_range, integer
from attnx.ops.reducers import Reduction, fuse_heads
from attnx.trace.records import LayerRecord
from attnx.trace.trace import Trace


def cls_map(trace: Trace, layer: str | int | None = None) -> Tensor:
    """Attention of the class token to the patches in one layer, not renormalised, as in DINO.

    For an attention-pooling layer, which has one query, it is the map of that query.

    Args:
        trace: a capture of all rows, or of rows that include 0.
        layer: name or index in the trace; None: the last self-attention layer with a class token, or else the last
            layer with a single query.

    Returns:
        [B, h, w] float32, or [B, H, h, w] for a capture with heads="each".

    Raises:
        ValueError: the model has no class token, its row was not captured, or the layer's rows are not tokens of the
            image.
        KeyError: no such layer was captured.

    Reference:
        DINO, https://github.com/facebookresearch/dino/blob/main/visualize_attention.py

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> attnx.cls_map(trace).shape
        torch.Size([2, 12, 12])
    """
    name = cls_layer(trace) if layer is None else layer
    rows = _cls_rows(trace, name)
    return trace.layout_of(name).patches(rows)


def cls_layer(trace: Trace) -> str:
    """Name of the layer that `cls_map` reads by default."""
    token = pool = None
    for name in trace:
        queries, keys = trace.sides(name)
        if queries == keys and keys.cls:
            token = name
        elif queries.count == 1:
            pool = name
    last = token or pool or next(reversed(list(trace)), None)
    if last is None:
        raise ValueError("cls_map: expected a trace of at least one layer; got none")
    return last


@dataclass(frozen=True)
class LayerMaps:
    """The class token's map in every layer, and the max, min and mean over layers.

    Attributes:
        names: the L layers.
        maps: [B, L, h, w] float32, or [B, L, H, h, w] for heads="each".
        max, min, mean: [B, h, w], or [B, H, h, w] for heads="each".
    """

    names: tuple[str, ...]
    maps: Tensor

    @property
    def max(self) -> Tensor:
        """Maximum over layers."""
        return self.maps.amax(1)

    @property
    def min(self) -> Tensor:
        """Minimum over layers."""
        return self.maps.amin(1)

    @property
    def mean(self) -> Tensor:
        """Mean over layers."""
        return self.maps.mean(1)


def layer_maps(trace: Trace, heads: str | None = None, *, token: int | None = None) -> LayerMaps:
    """The class token's map in every captured layer, or another token's, and the max, min and mean over layers.

    Args:
        trace: a capture of all rows, or of rows that include the token's.
        heads: how to fuse the heads of a capture with heads="each": "mean" (default), "max", "min", or "each" to keep
            them. For other captures it must be the capture's own value.
        token: index of the token whose row is read, as in `attnx.token_map`; None: the class token.

    Returns:
        `LayerMaps`: maps [B, L, h, w], or [B, L, H, h, w] for heads="each", and max, min and mean without L.

    Raises:
        ValueError: the model has no such token, its row was not captured, or the layers have different tokens (the
            message lists them) or numbers of heads.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> layers = attnx.layer_maps(trace)
        >>> layers.maps.shape, layers.mean.shape
        (torch.Size([2, 4, 12, 12]), torch.Size([2, 12, 12]))
    """
    kind = fusion(trace, heads)
    layout = trace.layout
    rows = [_cls_rows(trace, name) if token is None else token_row(trace, name, token) for name in trace]
    fused = [fuse_heads(r[:, :, None], kind)[:, 0] if r.dim() == 3 and kind is not Reduction.EACH else r for r in rows]
    shapes = dict.fromkeys(tuple(r.shape) for r in fused)
    if len(shapes) > 1:
        raise ValueError(f"layer_maps: expected maps of one shape; got {', '.join(map(str, shapes))}; choose layers=")
    return LayerMaps(tuple(trace), layout.patches(torch.stack(fused, 1)))


def fusion(trace: Trace, heads: str | None) -> Reduction:
    """The reduction of a trace's heads that remains to be applied; EACH if the capture fused them.

    Raises:
        ValueError: `heads` differs from the capture's `heads`.
    """
    if trace.heads == "each":
        return Reduction.parse(heads or "mean")
    if heads not in (None, trace.heads):
        raise ValueError(
            f"heads: the capture fused them by {trace.heads!r}; got {heads!r}; capture with heads={heads!r}"
        )
    return Reduction.EACH


def _cls_rows(trace: Trace, layer: str | int) -> Tensor:
    """Row of the class token in a layer, or of a pooling layer's only query: [B, N] or [B, H, N]."""
    record = trace.kept(layer)
    queries, keys = trace.sides(layer)
    if queries.count != 1:
        layout = trace.layout_of(layer)
        if not layout.cls:
            raise ValueError(f"the model has no class token ({layout}); use rollout, or read trace[{layer!r}]")
        if queries != keys:
            raise ValueError(f"layer {layer!r}: expected rows of the image's tokens; got {queries} over {keys}")
    return captured_row(trace, record, 0, queries.count, "the class token's row")


def token_row(trace: Trace, layer: str | int, token: int) -> Tensor:
    """Row of a query in a layer: [B, N], or [B, H, N] for heads="each".

    Raises:
        ValueError: the layer has no such query, or its row was not captured.
    """
    count = trace.sides(layer)[0].count
    return captured_row(trace, trace.kept(layer), index_of(token, count, layer), count, f"row {token}")


def index_of(token: int, count: int, layer: str | int) -> int:
    """The index of a token, not negative. Raise ValueError unless it is an integer in -count..count - 1."""
    at = integer(token)
    if at is None or not -count <= at < count:
        raise ValueError(f"token: expected an index in -{count}..{count - 1} of layer {layer!r}; got {token!r}")
    return at % count


def captured_row(trace: Trace, record: LayerRecord, row: int, count: int, name: str) -> Tensor:
    """A row of a layer with `count` queries, among the captured rows; `name` is for the message of the ValueError."""
    if trace.rows is None:
        return record.row(row)
    captured = in_range(trace.rows, count)
    if row not in captured:
        raise ValueError(f"{name} was not captured: expected {row} among rows; got {list(trace.rows)}")
    return record.row(captured.index(row))


def inverse(sums: Tensor) -> Tensor:
    """1 / sums, and 0 for a sum of 0: a row without weight passes nothing on."""
    return torch.where(sums > 0, 1 / sums, 0.0)
