"""Statistics of each row of attention weights, alone or beside the output and the map of the same call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnx.ops import operators
from attnx.ops.backends import choose, eager
from attnx.ops.checks import (
    cast_as_sdpa,
    check_backend,
    check_float32,
    check_sinks,
    check_tensors,
    resolve_scale,
    resolve_softcap,
)
from attnx.ops.reducers import Reduction
from attnx.ops.registration import Operator
from attnx.ops.scores import Scores
from attnx.ops.sinks import lse_with_sinks, with_sinks
from attnx.ops.statistics import NAMES, Statistic, Statistics, by_name, grid_places, parse

Places = tuple[Tensor, Tensor]
Found = tuple[Tensor | None, Tensor | None, Tensor]


def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    stats: Sequence[str] = NAMES,
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    suffix: int = 0,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> dict[str, Tensor]:
    """Statistics of each row of attention weights of each head, without the weights. Detached.

    Of ``P = softmax(q k^T * scale + bias)`` they are

    - "entropy": ``-sum_j P_ij log P_ij`` in nats, between 0 and log N;
    - "distance": ``sum_j P_ij d(i, j)``, where d is the Euclidean distance of two patches on the grid, 1 between
      neighbours. Prefix and suffix tokens are no patches: as keys they add nothing (the other weights are not
      renormalised), and as queries they have NaN: take the mean over ``[..., prefix:]``;
    - "max": ``max_j P_ij``, the largest weight;
    - "mass": ``sum_j P_ij`` over the prefix tokens, such as a class token and registers.

    Args:
        q, k, bias, is_causal, scale, softcap, sinks, backend, attn_mask, enable_gqa: as in `attnx.attention`.
        stats: which of them.
        grid: (rows, columns) of patches; needed for "distance". Queries and keys are then the same tokens.
        prefix, suffix: numbers of tokens before and after the patches.
        lse: [B, H, M] float32 as `attnx.attention_lse` gives it, with the same sinks, where it is known already.

    Returns:
        {name: [B, H, M] float32} in the order of `stats`. Rows whose keys are all masked are zero, except the distance
        of a query that is no patch. The same inputs give the same bits every time.

    Raises:
        ValueError: a name, grid or prefix that doesn't fit; and as in `attnx.attention`.
        NotImplementedError: as in `attnx.attention`.

    Reference:
        Raghu et al., "Do Vision Transformers See Like Convolutional Neural Networks?",
        https://arxiv.org/abs/2108.08810 (distance); Darcet et al., "Vision Transformers Need Registers",
        https://arxiv.org/abs/2309.16588 (mass)

    Example:
        >>> q, k = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 10, 16)
        >>> stats = attnx.attention_stats(q, k, grid=(3, 3), prefix=1)
        >>> stats["entropy"].shape, bool((stats["distance"][:, :, 1:] < 8 ** 0.5).all())
        (torch.Size([2, 4, 10]), True)
    """
    which = parse(stats)
    q, k = cast_as_sdpa(q, k)
    bias = check_tensors(q, k, None, bias, "mean", attn_mask)
    M, N = q.shape[2], k.shape[2]
    for name, count in (("prefix", prefix), ("suffix", suffix)):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= N:
            raise ValueError(f"{name}: expected a number of tokens in 0..{N}; got {count!r}")
    places = None
    if which & Statistic.DISTANCE:
        at = _grid_places(grid, (prefix, suffix), M, N, q.device)
        places = at, at
    return attention_with_stats(
        q, k, None, heads=None, stats=stats, places=places, prefix=prefix, bias=bias, is_causal=is_causal, scale=scale,
        softcap=softcap, sinks=sinks, lse=lse, backend=backend,
    )[2]  # fmt: skip


def attention_with_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    heads: str | None,
    stats: Sequence[str],
    places: Places | None = None,
    prefix: int = 0,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
    """Output, map and statistics of one call: on CPUs of one product of q and k. All are detached.

    Args:
        v: as in `attnx.attention`; None: no output.
        heads: as in `attnx.attention`; None: no map.
        stats, prefix: as in `attention_stats`.
        places: (queries [P, M, 2], keys [P, N, 2]) float32: row and column of each token on the grid, NaN for one
            without a place. P divides B; item b has the places b % P. Needed for "distance".

    Returns:
        out [B, H, M, Dv] or None, the map or None, and {name: [B, H, M] float32}.

    Raises:
        ValueError, NotImplementedError: as in `attention_stats`.
    """
    if v is None:
        q, k = cast_as_sdpa(q, k)
    else:
        q, k, v = cast_as_sdpa(q, k, v)
    bias = check_tensors(q, k, v, bias, heads or "mean")
    check_float32("lse", lse, q.shape[:3], q.device)
    cap, name, scale = resolve_softcap(softcap), check_backend(backend), resolve_scale(scale, q)
    which = parse(stats)
    if which & Statistic.DISTANCE:
        _check_places(places, q, k)
    q, k = q.detach(), k.detach()
    v, bias, lse = (None if t is None else t.detach() for t in (v, bias, lse))
    with_output, without = v is not None, None
    if sinks is not None and v is not None:
        check_sinks(sinks, q)
        without, lse = with_sinks(*operators.attention_lse(q, k, v, bias, is_causal, scale, cap, name), sinks)
        v = None
    lse = lse_with_sinks(q, k, bias, is_causal, scale, cap, sinks, lse, name)
    queries_at, keys_at = (None, None) if places is None else (t.contiguous() for t in places)
    out, amap, found = row_statistics(
        q, k, v, bias, is_causal, scale, cap, heads or "", lse, which, queries_at, keys_at, prefix, name
    )
    return (
        (out if without is None else without) if with_output else None,
        None if heads is None else amap,
        by_name(found, which, stats),
    )


@Operator
def row_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    heads: str,
    lse: Tensor | None,
    which: int,
    queries_at: Tensor | None,
    keys_at: Tensor | None,
    prefix: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (empty without v), map (empty for heads=""), and statistics [S, B, H, M], see `Statistics`."""
    scores, statistics = Scores(q, k, bias, is_causal, scale, softcap), Statistics(which, prefix, queries_at, keys_at)
    if scores.is_empty:
        out, amap, _ = _results(q, k, v, heads, which)
        return out.zero_(), amap.zero_(), statistics.of_empty_rows(q)
    reduction = Reduction.parse(heads) if heads else None
    match choose(backend, scores, v, reduction):
        case "triton" | "hopper":
            from attnx.ops.backends import triton

            found: Found = triton.attention_stats(scores, v, reduction, statistics, lse)
        case "native":
            from attnx.ops.backends import native

            found = native.attention_stats(scores, v, reduction, statistics, lse)
        case "eager":
            found = eager.attention_stats(scores, v, reduction, statistics, lse)
    return q.new_empty(0) if found[0] is None else found[0], q.new_empty(0) if found[1] is None else found[1], found[2]


@row_statistics.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, is_causal: bool, scale: float, softcap: float,
    heads: str, lse: Tensor | None, which: int, queries_at: Tensor | None, keys_at: Tensor | None, prefix: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results(q, k, v, heads, which)


def _results(q: Tensor, k: Tensor, v: Tensor | None, heads: str, which: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of `row_statistics`."""
    out = q.new_empty(0) if v is None else Scores(q, k, None, False, 1.0).new_output(v)
    amap = operators.new_map(q, k, heads, None) if heads else q.new_empty(0)
    return out, amap, Statistics(which).new_result(q)


def _check_places(places: Places | None, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless places are float32 [P, M, 2] and [P, N, 2] on q's device, and P divides B."""
    if places is None:
        raise ValueError("stats: 'distance' needs the places of the patches")
    items = len(places[0])
    for at, x in zip(places, (q, k), strict=True):
        fits = at.shape == (items, x.shape[2], 2) and at.dtype == torch.float32 and at.device == q.device
        if not fits or items == 0 or len(q) % items:
            raise ValueError(
                f"places: expected float32 [P, {x.shape[2]}, 2] on {q.device}, where P divides {len(q)}; got "
                f"{at.dtype} {list(at.shape)} on {at.device}"
            )


def _grid_places(
    grid: tuple[int, int] | None, around: tuple[int, int], queries: int, keys: int, device: torch.device
) -> Tensor:
    """[1, N, 2]: the places of tokens on a grid. Raise ValueError for a grid that doesn't fit.

    around: numbers of tokens before and after the grid.
    """
    sizes = list(grid) if isinstance(grid, Sequence) else []
    if len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"grid: expected (rows, columns) of patches for stats='distance'; got {grid!r}")
    if queries != keys or sum(around) + sizes[0] * sizes[1] != keys:
        after = f" + {around[1]}" if around[1] else ""
        raise ValueError(
            f"grid: expected queries and keys of prefix + grid = {around[0]} + {sizes[0]} x {sizes[1]}{after} tokens; "
            f"got {queries} queries and {keys} keys"
        )
    return grid_places((sizes[0], sizes[1]), around[0], keys, device)[None]
