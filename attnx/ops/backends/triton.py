"""The op on GPUs by the Triton kernels; on CPU tensors they run in Triton's interpreter."""

import os
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from attnx.kernels.arguments import precision, shared_args, value_args
from attnx.kernels.configs import (
    WHOLE_HEAD,
    WIDEST_HEAD,
    Config,
    Launch,
    ShortRows,
    gradient_config,
    map_config,
    one_pass_config,
)
from attnx.kernels.forward import forward_launch
from attnx.kernels.gradient import gradient_launch
from attnx.kernels.importance import importance_launch
from attnx.kernels.map import map_launch
from attnx.kernels.one_pass import one_pass_launch
from attnx.kernels.statistics import statistics_launch
from attnx.kernels.vecmat import vecmat_launch
from attnx.ops.backends import hopper, vendor
from attnx.ops.backends.launches import fused_map, run, target
from attnx.ops.backends.plans import by_plan, planned
from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores
from attnx.ops.statistics import Statistics

REDUCTIONS = (Reduction.MEAN, Reduction.MAX, Reduction.MIN, Reduction.EACH)  # that primitives.py has
ONE_PASS = 128
"""Up to this number of keys one launch makes output and map. Beyond it, on Hopper, the vendor's output and a launch for
the map are faster where the vendor can serve: they take 0.84 of the time at 197 keys, 0.58 at 257 (H200)."""


def limits(scores: Scores, v: Tensor | None, reduction: Reduction | None) -> list[str]:
    """Reasons this backend can't take the call; empty if it can."""
    q, reasons, widest = scores.q, [], _widest(scores, v)
    if widest > WIDEST_HEAD:
        reasons.append(f"head dim {widest} is above {WIDEST_HEAD}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {q.dtype} is not float16, bfloat16 or float32")
    if q.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(q.device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(q.device)))
        reasons.append(f"compute capability {capability} is below 8.0: Triton has no matrix units there")
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"tensors are on {q.device.type}; set TRITON_INTERPRET=1 before triton is imported to interpret")
    if scores.softcap:
        reasons.append(f"it has no softcap ({scores.softcap:g}); backend='eager' has")
    if reduction is not None and reduction not in REDUCTIONS:
        reasons.append(f"it has no heads={reduction.name.lower()!r}; backend='eager' has")
    return reasons


def in_chunks(scores: Scores, v: Tensor | None) -> bool:
    """True if heads are so wide that the kernels read them in chunks."""
    wide: bool = _widest(scores, v) > WHOLE_HEAD
    return wide


def _widest(scores: Scores, v: Tensor | None) -> int:
    """The larger of D and Dv."""
    return max(scores.q.shape[-1], 0 if v is None else v.shape[-1])


def attention(
    scores: Scores, v: Tensor, reduction: Reduction, rows: Tensor | None, on_hopper: bool = False
) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] in q's dtype and map, see `ops.functional.attention`. on_hopper: prefer Hopper's kernels."""
    q, k = scores.q, scores.k
    options, inputs = (int(reduction), on_hopper, *_options(scores)), (q, k, v, scores.bias)
    both: tuple[Tensor, Tensor] | None = by_plan("attention", options, inputs) if rows is None else None
    if both is not None:
        return both
    short = _short_rows(scores, v) if rows is None else None
    one_launch = on_hopper and rows is None and hopper.takes_short_rows(scores, v)
    vendor_first = short is None or (k.shape[2] > ONE_PASS and target(q.device).arch == 90)
    if q.is_cuda and vendor_first and not one_launch:
        served = vendor.output_and_lse(scores, v, with_nan=False)
        if served is not None:
            return served[0], attention_map(scores, reduction, rows, served[1], on_hopper, inf_is_nan=True)
    if short is None and not one_launch:
        out, lse = attention_lse_by_kernel(scores, v)
        return out, attention_map(scores, reduction, rows, lse, on_hopper)

    def compute() -> tuple[Tensor, Tensor]:
        out = scores.new_output(v)
        if one_launch:
            return out, hopper.short_rows(scores, v, out, reduction)
        assert short is not None
        return out, _one_pass(_shared(scores, None), value_args(q, v, out), reduction, short)

    return planned("attention", options, inputs, compute)


def attention_map(
    scores: Scores,
    reduction: Reduction,
    rows: Tensor | None,
    lse: Tensor | None,
    on_hopper: bool = False,
    inf_is_nan: bool = False,
) -> Tensor:
    """The map alone, see `ops.functional.attention_map`. Only the chosen rows are loaded.

    inf_is_nan: a log-sum-exp of plus infinity means that its row has NaN, and not that it has no keys.
    """
    if rows is not None:
        return _map(scores, reduction, rows, lse, False, inf_is_nan)
    lse = None if lse is None else lse.contiguous()
    options = (int(reduction), on_hopper, inf_is_nan, *_options(scores))
    inputs = (scores.q, scores.k, scores.bias, lse)
    return planned("map", options, inputs, lambda: _map(scores, reduction, None, lse, on_hopper, inf_is_nan))


def _map(
    scores: Scores, reduction: Reduction, rows: Tensor | None, lse: Tensor | None, on_hopper: bool, inf_is_nan: bool
) -> Tensor:
    if on_hopper and lse is None and hopper.takes_short_rows(scores, None):
        return hopper.short_rows(scores, None, None, reduction)
    q, shared = scores.q, _shared(scores, rows)
    short = _short_rows(scores, None) if lse is None else None
    if short is not None:
        return _one_pass(shared, value_args(q, None, None), reduction, short)
    lse = _lse_of_rows(shared, rows, lse)
    if on_hopper:
        amap = hopper.long_map(scores, reduction, lse, inf_is_nan)
        if amap is not None:
            return amap
    config = map_config(shared["D"], q.element_size(), shared["M"], target(q.device), scores.bias is not None)

    def launch(maps: Tensor, splits: int) -> Launch:
        return map_launch(shared, lse, maps, int(reduction), splits, config, inf_is_nan)

    return fused_map(q, shared["M"], shared["N"], reduction, _tiles(shared, config), launch)


def _options(scores: Scores) -> tuple[Hashable, ...]:
    """The options that every launch depends on."""
    q = scores.q
    return scores.is_causal, scores.scale, precision(q.dtype) if q.dtype == torch.float32 else ""


def attention_lse(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output, as in `attention`, and log-sum-exps [B,H,M] fp32: the vendor's, or our kernel's where it can't serve."""
    served = vendor.output_and_lse(scores, v) if scores.q.is_cuda else None
    return attention_lse_by_kernel(scores, v) if served is None else served


def attention_lse_by_kernel(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps by our own kernel."""
    inputs = (scores.q, scores.k, v, scores.bias)
    return planned("forward", _options(scores), inputs, lambda: _forward(scores, v))


def _forward(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    q, out, shared = scores.q, scores.new_output(v), _shared(scores, None)
    lse = _lse(shared)
    for columns in zip(v.split(WHOLE_HEAD, -1), out.split(WHOLE_HEAD, -1), strict=True):
        run(forward_launch(shared, value_args(q, *columns), lse, target(q.device)), q)
    return out, lse


def vecmat(scores: Scores, r: Tensor, lse: Tensor | None, on_hopper: bool = False) -> Tensor:
    """r @ mean_h P, [B,N] fp32, see `ops.functional.vecmat`."""
    r, lse = r.contiguous(), None if lse is None else lse.contiguous()
    options, inputs = (on_hopper, *_options(scores)), (scores.q, scores.k, scores.bias, r, lse)
    # [B, H * parts, N]
    each = planned("vecmat", options, inputs, lambda: _vecmat(scores, r, lse, on_hopper))
    return each.sum(1) / scores.q.shape[1]


def _vecmat(scores: Scores, r: Tensor, lse: Tensor | None, on_hopper: bool) -> Tensor:
    """r @ P of each head, or of halves of its rows."""
    q, shared = scores.q, _shared(scores, None)
    lse = _lse_of_rows(shared, None, lse)
    passed = hopper.vecmat(scores, r, lse) if on_hopper else None
    if passed is not None:
        return passed
    each = q.new_empty((q.shape[0], q.shape[1], scores.k.shape[2]), dtype=torch.float32)
    run(vecmat_launch(shared, r, lse, each, target(q.device)), q)
    return each


def gradient_map(
    scores: Scores,
    grad: Tensor,
    v: Tensor,
    reduction: Reduction,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The gradient-weighted map, see `ops.functional.gradient_map`. Only the chosen rows are loaded."""
    q, shared = scores.q, _shared(scores, rows)
    lse = _lse_of_rows(shared, rows, lse)
    widest = max(q.shape[3], v.shape[3])
    config = gradient_config(widest, q.element_size(), shared["M"], target(q.device), scores.bias is not None)

    def launch(maps: Tensor, splits: int) -> Launch:
        return gradient_launch(shared, grad, v, lse, maps, int(reduction), clamp, splits, config)

    return fused_map(q, shared["M"], shared["N"], reduction, _tiles(shared, config), launch)


def attention_stats(
    scores: Scores, v: Tensor | None, reduction: Reduction | None, statistics: Statistics, lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Output, map and statistics, see `ops.attention_stats`: a launch each, from the same log-sum-exps."""
    q, shared, out = scores.q, _shared(scores, None), None
    if v is not None:
        out, lse = attention_lse(scores, v)
    lse = _lse_of_rows(shared, None, lse)
    amap = None if reduction is None else attention_map(scores, reduction, None, lse)
    stats = statistics.new_result(q)
    which, prefix, queries_at, keys_at = statistics
    run(statistics_launch(shared, lse, queries_at, keys_at, which, prefix, stats, target(q.device)), q)
    return out, amap, stats


def row_importance(scores: Scores, grad: Tensor, v: Tensor, lse: Tensor | None) -> Tensor:
    """[B,H,M]: the importance of each row, see `ops.row_importance`."""
    q, shared = scores.q, _shared(scores, None)
    lse, importance = _lse_of_rows(shared, None, lse), _lse(shared)
    run(importance_launch(shared, grad, v, lse, importance, target(q.device)), q)
    return importance


def _one_pass(shared: dict[str, Any], values: dict[str, Any], reduction: Reduction, short: ShortRows) -> Tensor:
    def launch(maps: Tensor, splits: int) -> Launch:
        return one_pass_launch(shared, values, maps, int(reduction), splits, short)

    q, rows, keys = shared["q_ptr"], shared["M"], shared["N"]
    return fused_map(q, rows, keys, reduction, cdiv(rows, short.config.block_m), launch)


def _shared(scores: Scores, rows: Tensor | None) -> dict[str, Any]:
    """The arguments that every kernel takes."""
    q, k, bias = scores.q, scores.k, scores.bias
    if bias is not None:
        # A repeating bias keeps its items: the kernels find an item's own.
        items = len(bias) if scores.bias_repeats else q.shape[0]
        bias = bias.expand(items, q.shape[1], q.shape[2], k.shape[2])
    shared: dict[str, Any] = shared_args(q, k, bias, rows, scores.scale, scores.is_causal)
    return shared


def _short_rows(scores: Scores, v: Tensor | None) -> ShortRows | None:
    q = scores.q
    return one_pass_config(
        _widest(scores, v), q.element_size(), scores.k.shape[2], target(q.device), scores.bias is not None
    )


def _lse(shared: dict[str, Any]) -> Tensor:
    q: Tensor = shared["q_ptr"]
    return q.new_empty((q.shape[0], q.shape[1], shared["M"]), dtype=torch.float32)


def _lse_of_rows(shared: dict[str, Any], rows: Tensor | None, lse: Tensor | None) -> Tensor:
    """[B,H,M] fp32, contiguous, of the rows that are asked for: chosen from a given one, or else computed."""
    if lse is not None:
        return (lse if rows is None else lse.index_select(2, rows)).contiguous()
    q, lse = shared["q_ptr"], _lse(shared)
    if rows is not None and rows.is_cuda:  # nothing is gathered: the kernels go where the rows say
        torch._assert_async(((rows >= 0) & (rows < q.shape[2])).all())
    run(forward_launch(shared, value_args(q, None, None), lse, target(q.device)), q)
    return lse


def _tiles(shared: dict[str, Any], config: Config) -> int:
    tiles: int = cdiv(shared["M"], config.block_m) * cdiv(shared["N"], config.block_n * config.parts)
    return tiles
