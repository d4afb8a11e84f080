"""The layers of a trace that form a chain of self-attention, and the vectors that the chain starts from."""

import warnings

import torch
from torch import Tensor

from attnx.ops.reducers import Reduction
from attnx.trace.layout import TokenLayout
from attnx.trace.records import LayerRecord
from attnx.trace.sides import Tokens, describe, stack_of
from attnx.trace.trace import Trace


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


def self_attention(trace: Trace) -> tuple[list[tuple[str, LayerRecord]], tuple[str, LayerRecord] | None]:
    """(name, record) of the self-attention layers in order, and of a final pooling layer [1, N] or None.

    Raises:
        ValueError: the layers do not follow one another, have different tokens, or one of them has no map.
    """
    if trace.rows is not None:
        raise ValueError(f"rollout needs whole maps: expected a capture with rows=None; got rows={list(trace.rows)}")
    beside = trace.side_by_side()
    if beside is not None:
        raise ValueError(
            f"rollout: expected layers in a row; {beside[1]} runs beside {beside[0]}: both have the same input; "
            "choose layers= of one"
        )
    gaps = trace.gaps()
    if gaps:
        others = [name for name in trace if stack_of(name) == stack_of(gaps[0])]
        raise ValueError(
            f"rollout: expected a map of every layer; {', '.join(gaps)} ran without one, so the chain would skip it: "
            "write an adapter (docs/adding-a-model.md), or, if it is not part of the chain, choose the others by "
            f"layers={others}"
        )
    layers: list[tuple[str, LayerRecord]] = []
    pool: tuple[str, LayerRecord] | None = None
    rows: set[tuple[Tokens, str]] = set()
    fits = True
    for name in trace:
        if "#" in name:
            first = name.partition("#")[0] or "the model itself"
            raise ValueError(f"rollout: expected layers in a row; {first} attends more than once in a pass ({name})")
        record = trace.kept(name)
        queries, keys = trace.sides(name)
        if queries == keys and keys.kind != "channels" and pool is None:
            layers.append((name, record))
            rows.add((keys, "" if trace.in_a_row else stack_of(name)))
        elif record.shape[-2] == 1 and pool is None and layers and keys == trace.sides(layers[-1][0])[1]:
            pool = name, record
        else:
            fits = False
    if trace.given_layout is not None:
        n = trace.given_layout.tokens
        odd = next((name for name in trace if trace.kept(name).shape[-1] != n), None)
        if odd is not None:
            raise ValueError(
                f"rollout: expected maps of {n} x {n} tokens; got {list(trace.kept(odd).shape[-2:])} from {odd}; "
                "choose layers= of one self-attention stack"
            )
    if not fits or len(rows) > 1:
        raise ValueError(
            "rollout: expected self-attention layers over the same tokens, one after the other; got "
            f"{describe(trace.all_sides(), by_stack=True)}; choose some of one kind, such as {_choice(trace)}"
        )
    if not layers:
        raise ValueError("rollout: expected at least one self-attention layer in the trace; got none")
    return layers, pool


def _choice(trace: Trace) -> str:
    """An example of layers of the trace that `rollout` accepts, for error messages."""
    square = [name for name in trace if trace.sides(name)[0] == trace.sides(name)[1]]
    images = [name for name in square if trace.sides(name)[1].grid] or square
    if not images:
        return "layers= of a self-attention stack, if there is one"
    kind, stem = trace.sides(images[-1])[1], stack_of(images[-1])
    group = [name for name in square if trace.sides(name)[1] == kind and stack_of(name) == stem]
    for pattern in (f"{stem}.*", f"{stem}*", f"{stem}.*{group[0].rpartition('.')[2]}"):
        if stem and set(trace.select_names(pattern)) == set(group):
            return f"layers={pattern!r}"
    return f"layers={group}"


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
        layout: token layout; None for query="all".
    """
    B, n, device = last.shape[0], last.shape[-1], last.device
    if query == "all" or layout is None:
        return torch.eye(n, device=device).expand(B, n, n), None
    cls, prefix = layout.cls is True, layout.prefix
    if query is None and not cls and pool is not None:
        try:
            return pool[1].fused(kind).map(), None
        except RuntimeError as error:
            raise RuntimeError(
                f"{pool[0]}: {error}; or pass query='mean' if the score does not depend on it"
            ) from error
    start = torch.zeros(B, 1, n, device=device)
    if query == "mean" or (query is None and not cls):
        start[..., prefix:] = 1 / (n - prefix)
        return start, None
    if query is None or (isinstance(query, int) and not isinstance(query, bool) and 0 <= query < n):
        start[..., query or 0] = 1
        return start, query or 0
    raise ValueError(f"query: expected 'all', 'mean' or an index in 0..{n - 1}; got {query!r}")
