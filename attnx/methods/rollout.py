"""Attention rollout: a chain of vector products through the layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnx.methods.branches import branch_rollout, branches_of, fuse_branches
from attnx.methods.chain import self_attention
from attnx.methods.maps import fusion, inverse
from attnx.methods.queries import chain_start, over_patches, renamed
from attnx.ops.checks import integer
from attnx.ops.reducers import Reduction
from attnx.trace.layers import Layers
from attnx.trace.records import LayerRecord, MapRecord
from attnx.trace.trace import Trace
from attnx.trace.window_record import PatchMerge


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
    chain of vector products from the last layer to the first. For CrossViT it is the picture of both branches, see
    `attnx.branch_rollout`. For layers captured with keep="qk" no map is computed
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
        query: the query to follow: an index (-1: the last token), "mean" over the patches, or "all". None: the class
            token; for a model without one its attention-pooling layer, if captured, else "mean". Text needs a query.
        layers: the layers of the trace to use, as in `Trace.select` ("vision_model.*"); None: all.
        rows: deprecated, the former name of `query`.

    Returns:
        [B, h, w] float32; over text [B, N]; for query="all" the whole product, [B, N, N].

    Raises:
        ValueError: the layers are not one stack of self-attention over the same tokens (the message lists them; select
            some with `layers`), a layer of the stack ran without a map, or an argument is out of range.

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
        [B, h, w] float32; over text [B, N]; for query="all" the whole product, [B, N, N].

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
    branches = branches_of(trace)
    if branches is not None:
        _check_defaults(discard=discard, start=start, preset=preset, query=query)
        return fuse_branches(branch_rollout(trace, residual, heads=heads))
    kind = fusion(trace, heads)
    chain = self_attention(trace, weighted=not spare)
    layers = chain.layers
    if chain.windowed and (discard or preset):
        raise ValueError(
            f"rollout: discard and preset do not apply to windows; got discard={discard}, preset={preset!r}"
        )
    if not 0 <= start < len(layers):
        raise ValueError(f"start: expected a layer index in 0..{len(layers) - 1}; got {start}")
    layout = chain.layout(trace, start, query)
    mean = "mean" in (trace.heads, kind.name.lower())
    whole = query == "all" or discard > 0 or not mean
    result, row = chain_start(layers[-1][1], chain.pool, kind, query, layout)
    steps = chain.since(start)
    weights = {} if whole else _weights([record for _, record in steps], residual)
    for _, record in reversed(steps):
        if isinstance(record, PatchMerge):
            result = record.vecmat(result)
            continue
        layer: LayerRecord = record.fused(kind)
        if row is not None and preset is None and not discard:
            # A chain that starts from one row reads only that row of the last layer.
            passed, row = layer.row(row)[:, None], None
            step = (1 - residual) * passed + residual * result
            result = step * inverse((1 - residual) * passed.sum(-1, keepdim=True) + residual)
            continue
        row = None
        if whole and not chain.windowed:
            layer = MapRecord(
                _discard(layer.map(), discard, spare) if discard else layer.map(), layer.rows_sum_to_one and not discard
            )
        if layer.rows_sum_to_one:
            result = torch.lerp(result, layer.vecmat(result), 1 - residual)
            continue
        weight = weights.get(id(record))
        if weight is None:
            weight = inverse((1 - residual) * layer.row_sums() + residual)[:, None]
        if preset is None:
            result = result * weight
        step = torch.lerp(result, layer.vecmat(result), 1 - residual)
        result = step * weight if preset else step
    values = over_patches(result, layout, query)
    if not preset or query == "all":
        return values
    return values / values.flatten(1).amax(1).view(-1, *[1] * (values.dim() - 1))


def _weights(records: Sequence[LayerRecord | PatchMerge], residual: float) -> dict[int, Tensor]:
    """{id of a record: 1 / row sums of M_l, [B, 1, M]}, computed together for maps of one shape with fused heads.

    Records whose rows sum to 1 have none.
    """
    chosen = [r for r in records if isinstance(r, MapRecord) and r.amap.dim() == 3 and not r.rows_sum_to_one]
    if len({record.shape for record in chosen}) != 1:
        return {}
    sums = torch.stack([record.row_sums() for record in chosen])
    weights = inverse((1 - residual) * sums + residual)[:, :, None].unbind(0)
    return {id(record): weight for record, weight in zip(chosen, weights, strict=True)}


def last_needed(trace: Trace, *, query: str | int | None = None, **options: Any) -> tuple[str, int | None]:
    """The last layer that `rollout` with these options reads, and the only row that it reads there (None: all).

    A negative row stays negative, so that it holds for images of another size.
    """
    if branches_of(trace) is not None:
        return list(trace)[-1], None
    chain = self_attention(trace)
    layers, layout = chain.layers, chain.layout(trace, query=query)
    if query is None and layout is not None and layout.cls is not True and chain.pool is not None:
        return chain.pool[0], None
    row = chain_start(layers[-1][1], None, Reduction.EACH, query, layout)[1]
    alone = options.get("preset") is None and not options.get("discard") and options.get("start", 0) < len(layers)
    return layers[-1][0], (integer(query) or 0) if alone and row is not None else None


def _check_defaults(**options: Any) -> None:
    """Raise ValueError for options that the rollout of CrossViT does not have."""
    given = [f"{name}={value!r}" for name, value in options.items() if value]
    if given:
        raise ValueError(f"rollout of CrossViT: expected only residual, heads and layers; got {', '.join(given)}")


def _discard(fused: Tensor, share: float, spare: bool) -> Tensor:
    """The maps with each item's int(N * N * share) smallest entries set to zero; `spare`: except entry (0, 0)."""
    flat = fused.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * share), 1, largest=False, sorted=False).indices
    dropped = flat.scatter(1, smallest, 0.0)
    if spare:
        dropped[:, 0] = flat[:, 0]
    return dropped.view_as(fused)
