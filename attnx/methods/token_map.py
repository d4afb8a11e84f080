"""The map of any token: the patches that it attends to, or the patches that attend to it."""

from torch import Tensor

from attnx.methods.maps import captured_row, index_of
from attnx.trace.gradient_record import GradientRecord
from attnx.trace.layout import TokenLayout
from attnx.trace.trace import Trace
from attnx.trace.window_record import WindowRecord


def token_map(trace: Trace, token: int, layer: str | int | None = None, *, to: bool = False) -> Tensor:
    """The patches that a token attends to: its row of a layer's map, not renormalised.

    ``m_j = P_ij`` for token i; with ``to``, ``m_i = P_ij`` for token j: how much each patch attends to it. In windows,
    P is the map of the whole grid, 0 between tokens of different windows. With keep="qk" only that row or column is
    computed, except in windows and of causal layers.

    Args:
        trace: a capture of all rows; without `to` and without windows, of rows that include the token's.
        token: index of the token, such as `trace.layout.token(row, column)` or `trace.layout.token_at(x, y, size)`;
            -1 is the last one. In cross-attention it is an index of a query, or with `to` of a key.
        layer: name or index in the trace; None: the last self-attention layer over patches, or else the last layer.
        to: True: who attends to the token.

    Returns:
        [B, h, w] float32, or [B, H, h, w] for a capture with heads="each"; [..., frames, h, w] for a video.

    Raises:
        ValueError: no such token, its row was not captured, or the other side of the map is not the patches of an
            image.
        KeyError: no such layer was captured.
        RuntimeError: no map was stored (keep="stats"), or a gradient capture had no backward pass.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> patch = trace.layout.token(row=3, column=5)
        >>> attnx.token_map(trace, patch).shape, attnx.token_map(trace, patch, layer=0, to=True).shape
        (torch.Size([2, 12, 12]), torch.Size([2, 12, 12]))
    """
    if layer is None:
        layer = token_layer(trace) or list(trace)[-1]
    record, windows = trace.kept(layer), trace.windows(layer)
    if trace.rows is not None and (to or windows is not None):
        need = "to=True" if to else "a layer that attends in windows"
        raise ValueError(f"token_map: expected a capture with rows=None for {need}; got rows={list(trace.rows)}")
    if windows is not None:
        record = WindowRecord(record, windows, renormalise=not isinstance(record, GradientRecord))
        layout = TokenLayout(0, windows.grid)
        queries = keys = layout.tokens
    else:
        queries, keys = (side.count for side in trace.sides(layer))
        layout = _layout_of_queries(trace, layer) if to else trace.layout_of(layer)
    at = index_of(token, keys if to else queries, layer)
    return layout.patches(record.column(at) if to else captured_row(trace, record, at, queries, f"row {token}"))


def token_layer(trace: Trace) -> str | None:
    """Name of the last self-attention layer over patches, or over windows of a known grid; None if there is none."""
    for layer in reversed(list(trace)):
        queries, keys = trace.sides(layer)
        if queries == keys and keys.grid is not None:
            return layer
    return None


def _layout_of_queries(trace: Trace, layer: str | int) -> TokenLayout:
    queries, keys = trace.sides(layer)
    layout = trace.layout_of(layer) if queries == keys else queries.layout
    if layout is None:
        raise ValueError(f"token_map: expected queries that are patches of an image; got {queries} over {keys}")
    return layout
