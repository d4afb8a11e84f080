"""Attention received: how much each patch is attended to in one layer, without a class token."""

import torch
from torch import Tensor

from attnx.methods.maps import fusion
from attnx.trace.tokens import Tokens
from attnx.trace.trace import Trace
from attnx.trace.window_record import WindowRecord


def received(trace: Trace, layer: str | int) -> Tensor:
    """The mean over a layer's queries of their attention to each patch, not renormalised.

    ``r_j = 1/M sum_i P_ij`` for M queries, with heads fused. In windows, P is the map of the whole grid: 0 between
    tokens of different windows.

    Args:
        trace: a capture of all rows (rows=None).
        layer: name or index in the trace.

    Returns:
        [B, h, w] float32, or [B, frames, h, w] for a video.

    Raises:
        ValueError: some rows of the map are missing, or the grid of its columns is not known.
        KeyError: no such layer was captured.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> from attnx.methods.received import received
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> received(trace, "blocks.3.attn").shape
        torch.Size([2, 12, 12])
    """
    if trace.rows is not None:
        raise ValueError(f"received: expected a capture with rows=None; got rows={list(trace.rows)}")
    record, windows = trace.kept(layer).fused(fusion(trace, None)), trace.windows(layer)
    if windows is not None:
        record = WindowRecord(record, windows)
    items, queries = record.shape[0], record.shape[-2]
    start = torch.full((items, 1, queries), 1 / queries, device=record.device)
    mean = record.vecmat(start)[:, 0]
    return mean.unflatten(1, windows.grid) if windows is not None else trace.layout_of(layer).patches(mean)


def last_on_grid(trace: Trace) -> str:
    """Name of the last layer that `received` can place on the grid of the image.

    Raises:
        ValueError: there is none; the message has the reason of each layer, once.
    """
    problems: dict[str, None] = {}
    for layer in reversed(list(trace)):
        queries, keys = trace.sides(layer)
        problem = _problem(queries, keys)
        if not problem:
            return layer
        problems[problem] = None
    raise ValueError(f"received: expected a layer over a known grid of patches; got {' and '.join(problems) or 'none'}")


def _problem(queries: Tokens, keys: Tokens) -> str:
    """The tokens that have no known place in the image, in words; "" if they have one."""
    if keys.grid is not None:
        return ""
    if keys.kind in ("channels", "text", "queries"):
        return f"maps over {keys.kind}"
    if keys.kind == "windows":
        return "windows with unknown places"
    return "pooled keys" if 1 < keys.count < queries.count else "tokens of an unknown grid"
