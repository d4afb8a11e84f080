"""The float64 oracle and torch's reference results.

The oracle uses plain softmax in float64 and shares no code with any backend.
"""

from collections.abc import Sequence

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
    """Output and map in float64 by plain softmax; arguments as in `attnx.attention`.

    Rows without keys are zero in both. A NaN or +inf among the scores makes its row NaN.
    """
    p = _softmax(biased_scores(q, k, bias, is_causal, scale, softcap=softcap), _hidden(q, k, bias, is_causal), sinks)
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
    """[B, H, M] float64 natural log-sum-exp of the scores; -inf, or the sink, for rows without keys."""
    return lse_of(biased_scores(q, k, bias, is_causal, scale, softcap=softcap), sinks)


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
    """The gradient-weighted map by autograd through an eager softmax; arguments as in `attnx.gradient_map`.

    dtype: dtype of the computation; float64 for the oracle, at least float32 for torch's reference.
    """
    p = _softmax(biased_scores(q, k, bias, is_causal, scale, dtype, softcap), _hidden(q, k, bias, is_causal), sinks)
    p = p.detach().requires_grad_()
    with torch.enable_grad():
        (dp,) = torch.autograd.grad(p @ _per_query_head(v.to(dtype), q), p, grad.to(dtype))
    weighted = (dp.clamp(min=0) if clamp else dp) * p.detach()
    return fuse_heads(_chosen(weighted, rows), Reduction.parse(heads))


def oracle_stats(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    places: tuple[Tensor, Tensor] | None = None,
    prefix: int = 0,
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> dict[str, Tensor]:
    """{name: [B, H, M]}: entropy, largest weight, mass on the prefix and, with places, distance, by plain softmax.

    Args:
        places: (queries [P, M, 2], keys [P, N, 2]), as in `attnx.ops.attention_stats.attention_with_stats`.
        dtype: dtype of the computation; float64 for the oracle, at least float32 for torch's reference.
    """
    p = _softmax(biased_scores(q, k, bias, is_causal, scale, dtype, softcap), _hidden(q, k, bias, is_causal), sinks)
    found = {
        "entropy": torch.where(p > 0, -p * p.log(), p).sum(-1),
        "max": p.max(-1).values,
        "mass": p[..., :prefix].sum(-1),
    }
    if places is not None:
        queries_at, keys_at = (at.to(dtype).repeat(len(q) // len(at), 1, 1) for at in places)
        far = torch.cdist(queries_at, keys_at.nan_to_num(), compute_mode="donot_use_mm_for_euclid_dist")
        far = far.masked_fill(keys_at[:, None, :, 0].isnan(), 0.0)
        no_place = queries_at[:, None, :, 0].isnan()
        found["distance"] = (p * far[:, None]).sum(-1).masked_fill(no_place, torch.nan)
    return found


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
    """Torch's reference for the error budget: the output of SDPA and the map of an eager softmax.

    The output is `F.scaled_dot_product_attention` in q's dtype, and is differentiable. SDPA has neither softcap nor
    sinks. With them, the output is the eager map of each head, rounded to q's dtype, times v.

    The map is the eager map of the inputs converted to fp32, because kernels sum products of half-precision numbers in
    fp32. This is much stricter than a reference with scores in bfloat16. A backend that rounds weights before it fuses
    the heads fails.
    """
    hidden = _hidden(q, k, bias, is_causal)
    wide = torch.promote_types(q.dtype, torch.float32)
    p = _softmax(biased_scores(q, k, bias, is_causal, scale, wide, softcap), hidden, sinks)
    amap = fuse_heads(_chosen(p, rows), Reduction.parse(heads)).float()
    if softcap is not None or sinks is not None:
        return p.to(q.dtype) @ _per_query_head(v, q), amap
    # A mask instead of is_causal: on CPUs SDPA masks before scaling, so scale <= 0 gives NaN.
    mask = None
    if bias is not None and bias.dtype != torch.bool:
        mask = _per_item(bias, q).to(q.dtype).masked_fill(hidden, -torch.inf)
    elif bias is not None or is_causal:
        mask = ~hidden
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if mask is not None:  # some GPU kernels of SDPA return the mean of all values for rows without keys
        out = out.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return out, amap


def biased_scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
) -> Tensor:
    """Scores [B, H, M, N]; -inf where a key is masked."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q.to(dtype) @ _per_query_head(k.to(dtype), q).transpose(-1, -2) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None and bias.dtype != torch.bool:
        s = s + _per_item(bias, q).to(dtype)
    return s.masked_fill(_hidden(q, k, bias, is_causal), -torch.inf)


def _softmax(s: Tensor, hidden: Tensor, sinks: Tensor | None = None) -> Tensor:
    p = torch.softmax(_beside_sinks(s, sinks), -1)[..., : s.shape[-1]]
    return p.masked_fill(hidden.all(-1, keepdim=True), 0.0)


def lse_of(s: Tensor, sinks: Tensor | None) -> Tensor:
    """Log-sum-exp of the scores over keys and sinks: [B, H, M]."""
    return _beside_sinks(s, sinks).logsumexp(-1)


def _beside_sinks(s: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, H, M, N + 1]: the scores with each head's sink as an additional key; [B, H, M, N] without sinks."""
    return s if sinks is None else torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], -1)


def _hidden(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """[B, H, M, N]: True where a key is masked by the diagonal, a boolean mask, or -inf in a bias."""
    hidden = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    if bias is not None:
        bias = _per_item(bias, q)
        hidden = hidden | (~bias if bias.dtype == torch.bool else bias.double() < MASK_THRESHOLD)
    if is_causal:
        hidden = hidden | torch.ones_like(hidden).triu(1)
    return hidden


def _per_item(bias: Tensor, q: Tensor) -> Tensor:
    """The bias with an item for every item of q, copied where it repeats."""
    repeats = bias.dim() == 4 and 1 < len(bias) < len(q)
    return bias.repeat(len(q) // len(bias), 1, 1, 1) if repeats else bias


def _per_query_head(t: Tensor, q: Tensor) -> Tensor:
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _chosen(p: Tensor, rows: Sequence[int] | Tensor | None) -> Tensor:
    return p if rows is None else p[:, :, torch.as_tensor(rows, dtype=torch.int64, device=p.device)]
