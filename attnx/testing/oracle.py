"""The float64 oracle, torch's own answers, and how far from the one a result may be, given the other.

The oracle uses plain softmax in float64 and shares no code with any backend, so none is its own judge.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.ops.reducers import MASK_THRESHOLD, Reduction, fuse_heads


def oracle(
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
) -> tuple[Tensor, Tensor]:
    """Output and map in float64, by plain softmax; arguments as in `attnx.attention`.

    A row without keys is zero in both; a NaN or an infinity among the scores makes its row NaN.
    """
    p = _softmax(_biased_scores(q, k, bias, is_causal, scale, softcap=softcap), _hidden(q, k, bias, is_causal), sinks)
    return p @ _per_query_head(v.double(), q), fuse_heads(_chosen(p, rows), Reduction.parse(heads))


def oracle_lse(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, H, M] float64 natural log-sum-exp of the scores; minus infinity, or the sink, for a row without keys."""
    return _lse(_biased_scores(q, k, bias, is_causal, scale, softcap=softcap), sinks)


def oracle_vecmat(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, N] float64: r times the mean map; arguments as in `attnx.vecmat`."""
    return (r.double()[:, None] @ oracle(q, k, k, bias, is_causal, scale, softcap=softcap, sinks=sinks)[1])[:, 0]


def oracle_gradient_map(
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
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The gradient-weighted map by autograd through an eager softmax; arguments as in `attnx.ops.gradient_map`.

    dtype: of the computation: float64 for the oracle, q's own for torch's answer to the same inputs.
    """
    p = _softmax(_biased_scores(q, k, bias, is_causal, scale, dtype, softcap), _hidden(q, k, bias, is_causal), sinks)
    p = p.detach().requires_grad_()
    with torch.enable_grad():
        (dp,) = torch.autograd.grad(p @ _per_query_head(v.to(dtype), q), p, grad.to(dtype))
    weighted = (dp.clamp(min=0) if clamp else dp) * p.detach()
    return fuse_heads(_chosen(weighted, rows), Reduction.parse(heads))


def torch_reference(
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
) -> tuple[Tensor, Tensor]:
    """Torch's own answer, whose error ours is measured against: SDPA's output, and the map of an eager softmax.

    The output is `F.scaled_dot_product_attention` in q's dtype; gradients flow through it. SDPA has neither softcap nor
    sinks: with them it is the eager map of every head, rounded to q's dtype, times v. The map is fp32 whatever the
    inputs are, since products of half-precision numbers are exact in fp32 and are summed there. So its reference is the
    eager map of the same inputs widened to fp32, which is far stricter than that of scores rounded to bfloat16: a
    backend that rounds its weights before it fuses the heads fails.
    """
    hidden = _hidden(q, k, bias, is_causal)
    wide = torch.promote_types(q.dtype, torch.float32)
    p = _softmax(_biased_scores(q, k, bias, is_causal, scale, wide, softcap), hidden, sinks)
    amap = fuse_heads(_chosen(p, rows), Reduction.parse(heads)).float()
    if softcap is not None or sinks is not None:
        return p.to(q.dtype) @ _per_query_head(v, q), amap
    # No is_causal: on CPUs SDPA hides before it scales, and a scale of 0 or less then gives NaN.
    mask = None
    if bias is not None and bias.dtype != torch.bool:
        mask = bias.to(q.dtype).masked_fill(hidden, -torch.inf)
    elif bias is not None or is_causal:
        mask = ~hidden
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if mask is not None:  # some of its kernels for GPUs give rows without keys the mean of all values
        out = out.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return out, amap


def budget(exact: Tensor, reference: Tensor, dtype: torch.dtype, exponent: float = 1.0) -> float:
    """How far from the oracle a result may be: ``2 * err(torch in the same dtype) + eps(dtype) * max|oracle|``.

    Args:
        exact: the oracle's result, float64.
        reference: torch's, see `torch_reference`.
        dtype: of the result under test: q's for an output or a gradient, float32 for a map.
        exponent: multiplies the second term. 1 for outputs; for a map the size of its scores, see `score_size`:
            a weight is ``exp(score - lse)``, and what fp32 rounds away from a score of 10 is ten times eps of the
            weight. Torch's softmax is lucky there (it subtracts the maximum, exactly, where a kernel that recomputes
            weights subtracts a rounded log-sum-exp), so its own error can't stand for it.
    """
    finite = exact.isfinite() & reference.isfinite()
    error, size = _largest((reference.double() - exact)[finite]), _largest(exact[finite])
    # Of float64 the oracle itself rounds as much.
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
    s = _biased_scores(q, k, bias, is_causal, scale, softcap=softcap)
    lse = _lse(s, sinks)
    return max(1.0, _largest(s[s.isfinite()]), _largest(lse[lse.isfinite()]))


def assert_within_budget(
    ours: Tensor, exact: Tensor, reference: Tensor, name: str = "result", exponent: float = 1.0
) -> None:
    """Raises AssertionError unless ours has the oracle's shape, NaNs and infinities, and an error within `budget`."""
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    strange = torch.where(finite, ~ours.isfinite(), (ours != exact) & ~(ours.isnan() & exact.isnan()))
    assert not strange.any(), f"{name}: {int(strange.sum())} of {strange.numel()} values finite or not as the oracle's"
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
    """Raises AssertionError unless output (if given) and map are a backend's right answer to these inputs.

    Right: dtypes as promised, errors within budget, and a weight that is zero in the oracle exactly zero.
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
    """Raises AssertionError unless output and log-sum-exp are a backend's right answer to these inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    assert lse.dtype == torch.float32, f"lse: dtype {lse.dtype}, expected torch.float32"
    torch_lse = _lse(_biased_scores(q, k, bias, is_causal, scale, wide, softcap), sinks)
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
    """Raises AssertionError unless ours is a backend's right answer; the reference is r times torch's float32 map."""
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
    """Raises AssertionError unless ours is a backend's right answer, and zero where the oracle is."""
    call = (grad, q, k, v, bias, is_causal, scale, heads, clamp, rows)
    more: dict[str, Any] = dict(softcap=softcap, sinks=sinks)
    exact = oracle_gradient_map(*call, **more)
    reference = oracle_gradient_map(*call, **more, dtype=torch.promote_types(q.dtype, torch.float32))
    assert ours.dtype == torch.float32, f"gradient map: dtype {ours.dtype}, expected torch.float32"
    # The weights as in a map, and the gradients' own digits.
    assert_within_budget(
        ours, exact, reference, "gradient map", 1 + score_size(q, k, bias, is_causal, scale, softcap, sinks)
    )
    assert not ours[exact == 0].any(), "gradient map: entries that are zero in the oracle are not"


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
    """Raises AssertionError unless the output is within budget, and zero for rows without keys."""
    call: dict[str, Any] = dict(bias=bias, is_causal=is_causal, scale=scale, softcap=softcap, sinks=sinks)
    exact, reference = oracle(q, k, v, **call)[0], torch_reference(q, k, v, **call)[0]
    assert out.dtype == q.dtype, f"out: dtype {out.dtype}, expected {q.dtype}"
    assert_within_budget(out, exact, reference, "out")
    assert not out[(exact == 0).all(-1)].any(), "out: rows without keys are not zero"


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _biased_scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
) -> Tensor:
    """[B, H, M, N]; minus infinity where a key may not be attended."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q.to(dtype) @ _per_query_head(k.to(dtype), q).transpose(-1, -2) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias.to(dtype)
    return s.masked_fill(_hidden(q, k, bias, is_causal), -torch.inf)


def _softmax(s: Tensor, hidden: Tensor, sinks: Tensor | None = None) -> Tensor:
    p = torch.softmax(_beside_sinks(s, sinks), -1)[..., : s.shape[-1]]
    return p.masked_fill(hidden.all(-1, keepdim=True), 0.0)


def _lse(s: Tensor, sinks: Tensor | None) -> Tensor:
    return _beside_sinks(s, sinks).logsumexp(-1)


def _beside_sinks(s: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, H, M, N + 1]: the scores and each head's sink, as one more key; the scores alone without sinks."""
    return s if sinks is None else torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)


def _hidden(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """[B, H, M, N]: True where a key may not be attended: above the diagonal, False in a mask, -inf in a bias."""
    hidden = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    if bias is not None:
        hidden = hidden | (~bias if bias.dtype == torch.bool else bias.double() < MASK_THRESHOLD)
    if is_causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    return hidden


def _per_query_head(t: Tensor, q: Tensor) -> Tensor:
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _chosen(p: Tensor, rows: Sequence[int] | Tensor | None) -> Tensor:
    return p if rows is None else p[:, :, torch.as_tensor(rows, dtype=torch.int64, device=p.device)]
