"""The query that a chain of layers follows: the vectors that the chain starts from, and the shape of its result."""

import warnings

import torch
from torch import Tensor

from attnx.ops.checks import integer
from attnx.ops.reducers import Reduction
from attnx.trace.layout import TokenLayout
from attnx.trace.records import LayerRecord


def renamed(query: str | int | None, rows: str | int | None, stacklevel: int = 3) -> str | int | None:
    """The query, also under its former name `rows`.

    Raises:
        ValueError: both are given.

    Warns:
        DeprecationWarning: `rows` is given.
    """
    if rows is None:
        return query
    if query is not None:
        raise ValueError(f"rows: expected query alone, its new name; got query={query!r} and rows={rows!r}")
    warnings.warn("attnx: rows of rollout, gradient_rollout and relevance is now query", DeprecationWarning, stacklevel)
    return rows


def chain_start(
    last: LayerRecord,
    pool: tuple[str, LayerRecord] | None,
    kind: Reduction,
    query: str | int | None,
    layout: TokenLayout | None,
) -> tuple[Tensor, int | None]:
    """The vectors [B, R, N] that the chain starts from, and the single row that they select, or None.

    Args:
        last: record of the last self-attention layer.
        pool: name and record of a pooling layer after it; used only if query is None and there is no class token.
        kind: how to fuse the pool's heads.
        query: as in `rollout`.
        layout: token layout; None for query="all", and for text.
    """
    B, n, device = last.shape[0], last.shape[-1], last.device
    if query == "all":
        return torch.eye(n, device=device).expand(B, n, n), None
    layout = TokenLayout(0, (1, n)) if layout is None else layout
    cls = layout.cls is True
    if query is None and not cls and pool is not None:
        try:
            return pool[1].fused(kind).map(), None
        except RuntimeError as error:
            raise RuntimeError(
                f"{pool[0]}: {error}; or pass query='mean' if the score does not depend on it"
            ) from error
    start = torch.zeros(B, 1, n, device=device)
    if query == "mean" or (query is None and not cls):
        # After patch merging, the last layer has fewer patches than the layout.
        start[..., layout.prefix : n - layout.suffix] = 1 / (n - layout.prefix - layout.suffix)
        return start, None
    at = 0 if query is None else integer(query)
    if at is not None and -n <= at < n:
        start[..., at] = 1
        return start, at % n
    raise ValueError(f"query: expected 'all', 'mean' or an index in -{n}..{n - 1}; got {query!r}")


def over_patches(result: Tensor, layout: TokenLayout | None, query: str | int | None) -> Tensor:
    """The result of a chain: over the patches [B, h, w]; [B, N] for text; the whole product for query="all"."""
    if query == "all":
        return result
    return result[:, 0] if layout is None else layout.patches(result[:, 0])
