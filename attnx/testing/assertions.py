"""Assertions that a backend's result is within the error budget of the float64 oracle."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnx.testing.oracle import (
    biased_scores,
    lse_of,
    oracle,
    oracle_gradient_map,
    oracle_lse,
    oracle_stats,
    oracle_vecmat,
    torch_reference,
)


def budget(exact: Tensor, reference: Tensor, dtype: torch.dtype, exponent: float = 1.0) -> float:
    """The largest allowed error of a result: ``2 * err(torch in the same dtype) + eps(dtype) * max|oracle|``.

    Args:
        exact: the oracle's result, float64.
        reference: torch's result, see `torch_reference`.
        dtype: dtype of the tested result: q's for an output or a gradient, float32 for a map.
        exponent: factor of the second term: 1 for outputs, `score_size` for maps. A weight is ``exp(score - lse)``,
            so rounding a score of 10 to fp32 changes the weight by up to 10 eps, relative to it. Torch's error does
            not cover this, because its softmax subtracts the exact maximum, and kernels that recompute weights
            subtract a rounded log-sum-exp.
    """
    finite = exact.isfinite() & reference.isfinite()
    error, size = _largest((reference.double() - exact)[finite]), _largest(exact[finite])
    # In float64 the oracle has the same rounding errors.
    rounded = 4.0 if dtype == torch.float64 else 1.0
    return 2 * error + rounded * torch.finfo(dtype).eps * size * exponent


def score_size(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> float:
    """The largest magnitude among the finite scores and log-sum-exps, at least 1."""
    s = biased_scores(q, k, bias, is_causal, scale, softcap=softcap)
    lse = lse_of(s, sinks)
    return max(1.0, _largest(s[s.isfinite()]), _largest(lse[lse.isfinite()]))


def assert_within_budget(
    ours: Tensor, exact: Tensor, reference: Tensor, name: str = "result", exponent: float = 1.0
) -> None:
    """Raise AssertionError unless `ours` has the oracle's shape, NaNs and infinities, and an error within `budget`."""
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    wrong = torch.where(finite, ~ours.isfinite(), (ours != exact) & ~(ours.isnan() & exact.isnan()))
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} values finite or not as the oracle's"
    error, allowed = _largest((ours.double() - exact)[finite]), budget(exact, reference, ours.dtype, exponent)
    assert error <= allowed, f"{name}: largest error {error:.3g} is above the budget of {allowed:.3g}"


def assert_attention(
    out: Tensor | None,
    amap: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
    rows: Sequence[int] | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise AssertionError unless output (if given) and map are correct.

    Checks dtypes, errors within budget, and that weights that are zero in the oracle are exactly zero.
    """
    exact_map = oracle(q, k, v, bias, is_causal, scale, heads, rows, softcap, sinks)[1]
    torch_map = torch_reference(q, k, v, bias, is_causal, scale, heads, rows, softcap, sinks)[1]
    assert amap.dtype == torch.float32, f"map: dtype {amap.dtype}, expected torch.float32"
    assert_within_budget(amap, exact_map, torch_map, "map", score_size(q, k, bias, is_causal, scale, softcap, sinks))
    assert not amap[exact_map == 0].any(), "map: weights of keys that may not be attended are not zero"
    if out is not None:
        assert_output(out, q, k, v, bias, is_causal, scale, softcap, sinks)


def assert_attention_lse(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise AssertionError unless output and log-sum-exp are correct."""
    wide = torch.promote_types(q.dtype, torch.float32)
    assert lse.dtype == torch.float32, f"lse: dtype {lse.dtype}, expected torch.float32"
    torch_lse = lse_of(biased_scores(q, k, bias, is_causal, scale, wide, softcap), sinks)
    exact = oracle_lse(q, k, bias, is_causal, scale, softcap, sinks)
    assert_within_budget(lse, exact, torch_lse, "lse")
    assert_output(out, q, k, v, bias, is_causal, scale, softcap, sinks)


def assert_vecmat(
    ours: Tensor,
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise AssertionError unless `ours` is correct; the reference is r times torch's float32 map."""
    exact = oracle_vecmat(r, q, k, bias, is_causal, scale, softcap, sinks)
    amap = torch_reference(q, k, k, bias, is_causal, scale, softcap=softcap, sinks=sinks)[1]
    reference = (r[:, None] @ amap)[:, 0]
    assert ours.dtype == torch.float32, f"vecmat: dtype {ours.dtype}, expected torch.float32"
    assert_within_budget(ours, exact, reference, "vecmat", score_size(q, k, bias, is_causal, scale, softcap, sinks))
    assert not ours[exact == 0].any(), "vecmat: keys that no row attends are not zero"


def assert_gradient_map(
    ours: Tensor,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
    clamp: bool = True,
    rows: Sequence[int] | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise AssertionError unless `ours` is correct, and zero where the oracle is zero."""
    call = (grad, q, k, v, bias, is_causal, scale, heads, clamp, rows)
    more: dict[str, Any] = dict(softcap=softcap, sinks=sinks)
    exact = oracle_gradient_map(*call, **more)
    reference = oracle_gradient_map(*call, **more, dtype=torch.promote_types(q.dtype, torch.float32))
    assert ours.dtype == torch.float32, f"gradient map: dtype {ours.dtype}, expected torch.float32"
    # The score size as for a map, plus 1 for the rounding of the gradients.
    assert_within_budget(
        ours, exact, reference, "gradient map", 1 + score_size(q, k, bias, is_causal, scale, softcap, sinks)
    )
    assert not ours[exact == 0].any(), "gradient map: entries that are zero in the oracle are not"


def assert_stats(
    ours: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    places: tuple[Tensor, Tensor] | None = None,
    prefix: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise AssertionError unless each statistic is correct, and zero where the oracle is zero.

    The entropy must be zero for rows without keys. For rows of one key its logarithm may have a rounding error.
    """
    call = (q, k, bias, is_causal, scale, places, prefix)
    more: dict[str, Any] = dict(softcap=softcap, sinks=sinks)
    exact = oracle_stats(*call, **more)
    reference = oracle_stats(*call, **more, dtype=torch.promote_types(q.dtype, torch.float32))
    exponent = score_size(q, k, bias, is_causal, scale, softcap, sinks)
    for name, stat in ours.items():
        assert stat.dtype == torch.float32, f"{name}: dtype {stat.dtype}, expected torch.float32"
        assert_within_budget(stat, exact[name], reference[name], name, exponent)
        zero = exact["max" if name == "entropy" else name] == 0
        assert not stat[zero].any(), f"{name}: values that are zero in the oracle are not"


def assert_output(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise AssertionError unless the output is within budget, and zero for rows without keys."""
    call: dict[str, Any] = dict(bias=bias, is_causal=is_causal, scale=scale, softcap=softcap, sinks=sinks)
    exact, reference = oracle(q, k, v, **call)[0], torch_reference(q, k, v, **call)[0]
    assert out.dtype == q.dtype, f"out: dtype {out.dtype}, expected {q.dtype}"
    assert_within_budget(out, exact, reference, "out")
    assert not out[(exact == 0).all(-1)].any(), "out: rows without keys are not zero"


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0
