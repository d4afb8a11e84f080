"""Attention rollout: a chain of vector products through the layers."""

import warnings
from typing import Any

import torch
from torch import Tensor

from attnx.methods.maps import fusion
from attnx.ops.reducers import Reduction
from attnx.trace.layers import Layers
from attnx.trace.layout import TokenLayout
from attnx.trace.records import LayerRecord, MapRecord
from attnx.trace.sides import Tokens, describe, stack_of
from attnx.trace.trace import Trace


def rollout(
    trace: Trace,
    residual: float = 0.5,
    discard: float = 0.0,
    start: int = 0,
    *,
    heads: str | None = None,
    preset: str | None = None,
    query: str | int | None = None,
    layers: Layers = None,
    rows: str | int | None = None,
) -> Tensor:
    """Attention rollout: the share of each patch in the class token after all layers.

    ``M_l = (1 - residual) F_l + residual I`` with rows normalised, where F_l is the map of layer l with heads fused.
    The result is the row of ``M_L ... M_start`` that belongs to the class token, over the patches. It is computed as a
    chain of vector products from the last layer to the first. For layers captured with keep="qk" no map is computed
    (`attnx.vecmat`), unless query="all", discard, or heads other than "mean" require it; then one layer at a time.

    Args:
        trace: a capture of all rows (rows=None), with any `keep`.
        residual: weight of the identity; Abnar & Zuidema use 0.5.
        discard: share of each item's smallest entries of F to set to zero, except the class token's own entry.
        start: first layer of the product; Chefer et al. use 1.
        heads: how to fuse the heads of a capture with heads="each" (default "mean"); for other captures it must be the
            capture's own value.
        preset: "vit-explain" divides column j, instead of row j, by the sum of row j, as that code does, and the
            result by its maximum. `discard` is not set by the preset; the default of that code is 0.9.
        query: the query to follow: an index, "mean" over the patches, or "all". None: the class token; for a model
            without one its attention-pooling layer, if captured, else "mean".
        layers: the layers of the trace to use, as in `Trace.select` ("vision_model.*"); None: all.
        rows: deprecated, the former name of `query`.

    Returns:
        [B, h, w] float32; for query="all" the whole product, [B, N, N].

    Raises:
        ValueError: the layers are not one stack of self-attention over the same tokens (the message lists them; select
            some with `layers`), or an argument is out of range.

    Reference:
        Abnar & Zuidema, "Quantifying Attention Flow in Transformers", https://arxiv.org/abs/2005.00928;
        https://github.com/jacobgil/vit-explain

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> attnx.rollout(trace).shape
        torch.Size([2, 12, 12])
        >>> attnx.rollout(trace, discard=0.9, query="all").shape
        torch.Size([2, 145, 145])
    """
    query = renamed(query, rows)
    trace = trace if layers is None else trace.select(layers)
    return _rollout(trace, residual, discard, start, heads, preset, query)


def gradient_rollout(
    trace: Trace,
    residual: float = 0.5,
    discard: float = 0.0,
    start: int = 0,
    *,
    preset: str | None = None,
    query: str | int | None = None,
    layers: Layers = None,
    rows: str | int | None = None,
) -> Tensor:
    """Rollout of maps weighted by their gradients: `rollout` with ``F_l = max(mean_h dP_l P_l, 0)``.

    Each map is multiplied by the gradient of its own layer. vit-explain multiplies the maps, first layer first, by the
    gradients, last layer first, so its results differ.

    Args:
        trace: a capture with grad="signed", after its backward pass.
        discard: as in `rollout`, but including the class token's own entry, as in vit-explain.
        residual, start, preset, query, layers, rows: as in `rollout`.

    Returns:
        [B, h, w] float32; for query="all" the whole product, [B, N, N].

    Raises:
        ValueError: as in `rollout`.
        RuntimeError: there was no backward pass.

    Reference:
        https://github.com/jacobgil/vit-explain/blob/main/vit_grad_rollout.py

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with attnx.capture(model, grad="signed") as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> trace.backward(logits[:, 5].sum())
        >>> attnx.gradient_rollout(trace).shape
        torch.Size([2, 12, 12])
    """
    query = renamed(query, rows)
    trace = trace if layers is None else trace.select(layers)
    positive = trace.mapped(lambda weighted: weighted.clamp(min=0))
    return _rollout(positive, residual, discard, start, None, preset, query, spare=False)


def _rollout(
    trace: Trace,
    residual: float,
    discard: float,
    start: int,
    heads: str | None,
    preset: str | None,
    query: str | int | None,
    spare: bool = True,
) -> Tensor:
    """See `rollout`; `spare`: do not discard the class token's own entry."""
    if not 0.0 <= residual <= 1.0 or not 0.0 <= discard < 1.0:
        raise ValueError(f"expected residual in [0, 1] and discard in [0, 1); got {residual} and {discard}")
    if preset not in (None, "vit-explain"):
        raise ValueError(f"preset: expected None or 'vit-explain'; got {preset!r}")
    if heads == "each":
        raise ValueError("heads: expected mean, max or min; got 'each': rollout fuses the heads of every layer")
    kind = fusion(trace, heads)
    layers, pool = self_attention(trace)
    layout = None if query == "all" else trace.layout
    if not 0 <= start < len(layers):
        raise ValueError(f"start: expected a layer index in 0..{len(layers) - 1}; got {start}")
    mean = "mean" in (trace.heads, kind.name.lower())
    whole = query == "all" or discard > 0 or not mean
    result, row = chain_start(layers[-1][1], pool, kind, query, layout)
    for _, record in reversed(layers[start:]):
        layer = record.fused(kind)
        if row is not None and preset is None and not discard:
            # A chain that starts from one row reads only that row of the last layer.
            passed, row = layer.row(row)[:, None], None
            step = (1 - residual) * passed + residual * result
            result = step * _inverse((1 - residual) * passed.sum(-1, keepdim=True) + residual)
            continue
        row = None
        if whole:
            layer = MapRecord(
                _discard(layer.map(), discard, spare) if discard else layer.map(), layer.rows_sum_to_one and not discard
            )
        if layer.rows_sum_to_one:
            result = torch.lerp(result, layer.vecmat(result), 1 - residual)
            continue
        weight = _inverse((1 - residual) * layer.row_sums() + residual)[:, None]
        if preset is None:
            result = result * weight
        step = (1 - residual) * layer.vecmat(result) + residual * result
        result = step * weight if preset else step
    if layout is None:
        return result
    patches = layout.patches(result[:, 0])
    return patches / patches.amax((-2, -1), keepdim=True) if preset else patches


def renamed(query: str | int | None, rows: str | int | None) -> str | int | None:
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
    warnings.warn("attnx: rows of rollout, gradient_rollout and relevance is now query", DeprecationWarning, 3)
    return rows


def last_needed(trace: Trace, *, query: str | int | None = None, **options: Any) -> tuple[str, int | None]:
    """The last layer that `rollout` with these options reads, and the only row that it reads there (None: all)."""
    layers, pool = self_attention(trace)
    layout = trace.layout
    if query is None and layout.cls is not True and pool is not None:
        return pool[0], None
    row = chain_start(layers[-1][1], None, Reduction.EACH, query, layout)[1]
    alone = options.get("preset") is None and not options.get("discard") and options.get("start", 0) < len(layers)
    return layers[-1][0], row if alone else None


def _inverse(sums: Tensor) -> Tensor:
    return torch.where(sums > 0, 1 / sums, 0.0)  # a row without weight passes nothing on


def self_attention(trace: Trace) -> tuple[list[tuple[str, LayerRecord]], tuple[str, LayerRecord] | None]:
    """(name, record) of the self-attention layers in order, and of a final pooling layer [1, N] or None.

    Raises:
        ValueError: the layers do not follow one another, or have different tokens.
    """
    if trace.rows is not None:
        raise ValueError(f"rollout needs whole maps: expected a capture with rows=None; got rows={list(trace.rows)}")
    beside = trace.side_by_side()
    if beside is not None:
        raise ValueError(
            f"rollout: expected layers in a row; {beside[1]} runs beside {beside[0]}: both have the same input; "
            "choose layers= of one"
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
            return f"rollout(trace, layers={pattern!r})"
    return f"rollout(trace, layers={group})"


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


def _discard(fused: Tensor, share: float, spare: bool) -> Tensor:
    """The maps with each item's int(N * N * share) smallest entries set to zero; `spare`: except entry (0, 0)."""
    flat = fused.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * share), 1, largest=False, sorted=False).indices
    dropped = flat.scatter(1, smallest, 0.0)
    if spare:
        dropped[:, 0] = flat[:, 0]
    return dropped.view_as(fused)
