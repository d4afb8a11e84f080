"""Distance, entropy and importance of each head: means over the rows of a layer."""

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

from attnx.ops.attention_stats import attention_with_stats
from attnx.ops.checks import in_range, row_indices
from attnx.trace.qk_record import QKRecord
from attnx.trace.records import MapRecord
from attnx.trace.row_stats import KNOWN, RowStats, Wanted, wanted_of
from attnx.trace.trace import Trace


def mean_attention_distance(trace: Trace, patch_size: float | None = None) -> Tensor:
    """Mean distance in pixels between a patch and the patches that it attends to, of each head.

    ``mean_i sum_j A_ij d_ij``, with d the Euclidean distance of the patches i and j. Prefix tokens are left out on both
    sides, and the weights of the others are not renormalised, so weight on the class token counts as distance 0.

    Args:
        trace: of a capture with stats=("distance",), keep="qk" or heads="each", of all rows.
        patch_size: pixels between neighbouring patches of every layer; None: inferred from the model's convolutions.

    Returns:
        [B, L, H] float32 for L layers; H is the largest number of heads, and a layer with fewer has NaN beyond them.

    Raises:
        ValueError: the trace holds none of these; a layer does not attend from patches to patches; or the size of the
            patches is unknown, or they are no squares.

    Reference:
        Raghu et al., https://arxiv.org/abs/2108.08810; as computed in
        https://github.com/sayakpaul/probing-vits/blob/main/notebooks/mean-attention-distance-1k.ipynb

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model, keep="stats", stats=["distance"]) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> attnx.mean_attention_distance(trace).shape
        torch.Size([2, 4, 6])
    """
    _check_patch_size(patch_size)
    return _by_layer("mean_attention_distance", trace, lambda layer: _mean_of(trace, layer, "distance", patch_size))


def row_entropy(trace: Trace, rows: str | int | Sequence[int] = "mean") -> Tensor:
    """Entropy of the rows of each head's weights in nats: ``-sum_j A_ij log A_ij``, from 0 to log N.

    Args:
        trace: of a capture with stats=("entropy",), keep="qk" or heads="each", of all rows.
        rows: "mean" over all queries, prefix tokens included, "all": each query, or indices of queries as in
            `attnx.capture` (0: the class token; -1: the last). Padding of windows is left out of the mean.

    Returns:
        [B, L, H] float32 for L layers, [B, L, H, M] for rows="all", or [B, L, H, R] for R rows. H is the largest number
        of heads, and a layer with fewer has NaN beyond them.

    Raises:
        ValueError: the trace holds none of these; rows of layers with different queries or with windows; or images with
            padding, of which `trace.item(i)` gives one without.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model, keep="stats", stats=["entropy"]) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> attnx.row_entropy(trace).shape, attnx.row_entropy(trace, rows="all").shape
        (torch.Size([2, 4, 6]), torch.Size([2, 4, 6, 145]))
    """
    if isinstance(rows, str) and rows not in ("mean", "all"):
        raise ValueError(f"rows: expected 'mean', 'all', or indices of queries; got {rows!r}")
    chosen = None if isinstance(rows, str) else row_indices(rows)

    def of_layer(layer: str) -> Tensor:
        if rows == "mean":
            return _mean_of(trace, layer, "entropy")
        stats, _ = _read(trace, layer, "entropy")
        if trace.windows(layer) is not None:
            raise ValueError(f"rows={rows!r}: expected layers without windows; got windows in {layer}")
        entropy: Tensor = stats["entropy"]
        return entropy if chosen is None else entropy[..., list(in_range(chosen, entropy.shape[-1]))]

    return _by_layer("row_entropy", trace, of_layer)


def head_importance(trace: Trace) -> Tensor:
    """The dependence of a score on each head: the mean over queries of ``sum_j |dA_ij A_ij|``, with dA the gradient.

    Its mean over images, of a loss, ranks heads for pruning.

    Args:
        trace: of a capture with grad=True and stats=("importance",), after the backward pass.

    Returns:
        [B, L, H] float32 for L layers. H is the largest number of heads, and a layer with fewer has NaN beyond them.

    Raises:
        ValueError: the trace has no importance.
        RuntimeError: no backward pass reached a layer.

    Reference:
        Michel et al., "Are Sixteen Heads Really Better than One?", https://arxiv.org/abs/1905.10650

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with attnx.capture(model, keep="stats", stats=["importance"], grad=True) as trace:
        ...     loss = -model(torch.rand(2, 3, 96, 96)).log_softmax(-1)[:, 0].sum()
        >>> trace.backward(loss)
        >>> attnx.head_importance(trace).shape
        torch.Size([2, 4, 6])
    """
    return _by_layer("head_importance", trace, lambda layer: _mean_of(trace, layer, "importance"))


def head_means(trace: Trace, stats: Sequence[str], patch_size: float | None = None) -> Tensor:
    """The mean of each statistic over the rows of each head, for the heads of all layers one after another.

    Args:
        trace: as in `row_entropy`.
        stats: names of `attnx.attention_stats`, or "importance". The distance is `mean_attention_distance`, in pixels;
            the others are means over all queries.
        patch_size: as in `mean_attention_distance`.

    Returns:
        [B, S, T] float32 for S statistics and the T heads of all layers.

    Raises:
        ValueError, RuntimeError: as in `mean_attention_distance` and `head_importance`.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> from attnx.methods.probes import head_means
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model, keep="stats", stats=["max", "mass"]) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> head_means(trace, ["max", "mass"]).shape
        torch.Size([2, 2, 24])
    """
    if not stats or any(name not in KNOWN for name in stats):
        raise ValueError(f"stats: expected names among {', '.join(KNOWN)}; got {list(stats)}")
    _check_patch_size(patch_size)

    return torch.cat([layer_means(trace, layer, stats, patch_size) for layer in trace], 2)


def layer_means(trace: Trace, layer: str, stats: Sequence[str], patch_size: float | None = None) -> Tensor:
    """[B, S, H] float32: `head_means` of one layer."""
    return torch.stack([_mean_of(trace, layer, name, patch_size) for name in stats], 1)


def uniform_means(trace: Trace, stats: Sequence[str], patch_size: float | None = None) -> Tensor:
    """[S, L] float32: the means of heads that attend to all keys of a layer alike; NaN for importance.

    Args:
        trace, stats, patch_size: as in `head_means`.
    """

    def of_layer(layer: str, name: str) -> Tensor:
        if name == "importance":
            return torch.full((), torch.nan)
        wanted, (*_, M, N), windows = _wanted(trace, layer, name), trace.kept(layer).shape, trace.windows(layer)
        zeros = torch.zeros(1 if windows is None else windows.count, 1, M, 1, device=trace.kept(layer).device)
        found = attention_with_stats(
            zeros, zeros[:, :, :1].expand(-1, -1, N, -1), None, heads=None, stats=[name], places=wanted.places,
            prefix=wanted.prefix,
        )  # fmt: skip
        return _mean_of(trace, layer, name, patch_size, found[2][name])[0, 0]

    return torch.stack([torch.stack([of_layer(layer, name).cpu() for layer in trace]) for name in stats])


def _mean_of(
    trace: Trace, layer: str, name: str, patch_size: float | None = None, stat: Tensor | None = None
) -> Tensor:
    """[B, H]: mean of a statistic of a layer over its queries, without padding.

    The mean distance is over the queries that are patches, in pixels. stat: in place of the trace's own.
    """
    if stat is None:
        found, wanted = _read(trace, layer, name)
        stat = found[name]
    else:
        wanted = _wanted(trace, layer, name)
    if name == "distance":
        assert wanted.places is not None
        patches = ~wanted.places[0][..., 0].isnan()
        return _mean(stat, patches) * (pixels_of(trace, layer) if patch_size is None else patch_size)
    windows = trace.windows(layer)
    return _mean(stat, None if windows is None else windows.places(stat.device)[0] < windows.tokens)


def _read(trace: Trace, layer: str, name: str) -> tuple[RowStats, Wanted]:
    """A statistic of a layer: stored, or computed from q and k or from the maps of each head."""
    record, (_, keys) = trace.kept(layer), trace.sides(layer)
    if trace.tokens.unpadded(layer, keys, 0, trace) is not None:
        raise ValueError(f"{layer}: expected images without padding; take one by trace.item(i)")
    wanted = _wanted(trace, layer, name)
    if name == "importance":
        stats = trace.stats[layer] if layer in trace.stats else RowStats({}, {})
        if name in stats.missing:
            raise RuntimeError(stats.missing[name])
        if name not in stats:
            raise ValueError(f"{layer}: expected a capture with grad=True and stats=('importance',)")
        return stats, wanted
    stored = trace.stats[layer] if layer in trace.stats else RowStats({}, {})
    from_qk = isinstance(record, QKRecord) and trace.rows is None
    from_map = isinstance(record, MapRecord) and len(record.shape) == 4 and trace.rows is None
    if name not in (*stored, *stored.missing) and not from_qk and not from_map:
        got = f"stats={tuple(stored)} and " if stored else ""
        raise ValueError(
            f"{layer}: expected a capture with stats=({name!r},), or with keep='qk' or heads='each' of all rows; got "
            f"{got}heads={trace.heads!r}" + ("" if trace.rows is None else f" of rows {list(trace.rows)}")
        )
    if name in wanted.missing:
        has = [other for other in trace if name not in _wanted(trace, other, name).missing]
        advice = f"; trace.select(...) can choose the {len(has)} layers that do: {has[0]} ... {has[-1]}" if has else ""
        raise ValueError(f"{wanted.missing[name]}{advice}")
    if name in stored:
        return stored, wanted
    if isinstance(record, QKRecord):
        return RowStats(record.stats(wanted.names, wanted.places, wanted.prefix), wanted.missing), wanted
    return wanted.of_weights(record.map()), wanted


def _wanted(trace: Trace, layer: str, name: str) -> Wanted:
    """The request for one statistic of a layer."""
    device, known = trace.kept(layer).device, trace.tokens.places
    return wanted_of((name,), layer, trace.sides(layer), trace.windows(layer), device, known=known)


def _mean(stat: Tensor, counted: Tensor | None) -> Tensor:
    """[B, H]: mean of a statistic [B * P, H, M] over the rows that count, [P, M] bool; None: all."""
    if counted is None:
        return stat.mean(-1)
    stat = stat.unflatten(0, (-1, len(counted)))
    return torch.where(counted[:, None], stat, 0.0).sum((1, 3)) / counted.sum()


def _check_patch_size(patch_size: float | None) -> None:
    """Raise ValueError unless the size is None, or a finite number above 0."""
    if patch_size is None or (isinstance(patch_size, int | float) and 0 < patch_size < inf):
        return
    raise ValueError(f"patch_size: expected a finite number of pixels above 0; got {patch_size!r}")


def pixels_of(trace: Trace, layer: str) -> float:
    """Pixels between neighbouring patches of a layer.

    Raises:
        ValueError: the number is not known, or the patches are no squares.
    """
    size = trace.tokens.patch_size(layer, trace.sides(layer)[0], trace)
    if size is None:
        raise ValueError(f"patch_size: expected it, since it is unknown in {layer}; pass patch_size=16, for example")
    if abs(size[0] - size[1]) > 1e-6 * size[0]:
        raise ValueError(
            f"patch_size: expected square patches; got {size[0]:g} x {size[1]:g} pixels in {layer}; "
            "trace.stats[layer]['distance'] is in patches"
        )
    return size[0]


def _by_layer(name: str, trace: Trace, of_layer: Callable[[str], Tensor]) -> Tensor:
    """[B, L, H, ...]: a result [B, H, ...] of each layer, with NaN for heads that a layer does not have."""
    if not isinstance(trace, Trace):
        raise ValueError(f"{name}: expected a Trace, which attnx.capture gives; got {type(trace).__name__}")
    if not len(trace):
        raise ValueError(f"{name}: expected a trace with layers; got none")
    found = {layer: of_layer(layer) for layer in trace}
    shapes = {(len(t), *t.shape[2:]) for t in found.values()}
    if len(shapes) > 1:
        sizes = ", ".join(f"{layer}: {list(t.shape)}" for layer, t in found.items())
        raise ValueError(
            f"{name}: expected layers of the same items and rows; got {sizes}; choose by trace.select(...)"
        )
    heads = max(t.shape[1] for t in found.values())
    return torch.stack([_padded(t, heads) for t in found.values()], 1)


def _padded(t: Tensor, heads: int) -> Tensor:
    return torch.cat([t, t.new_full((len(t), heads - t.shape[1], *t.shape[2:]), torch.nan)], 1)
