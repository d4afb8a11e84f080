"""The functional API: attention and its head-reduced map. Docstrings and checks; `operators` has the operators."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from attnx.ops import operators
from attnx.ops.autograd import differentiable
from attnx.ops.checks import (
    cast_as_sdpa,
    check_backend,
    check_dropout,
    check_float32,
    check_gradient,
    check_sinks,
    check_tensors,
    one_bias,
    resolve_scale,
    resolve_softcap,
    row_index,
)
from attnx.ops.known_calls import known, remember, signature
from attnx.ops.scores import Scores
from attnx.ops.sinks import lse_with_sinks, with_sinks


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: str = "mean",
    rows: int | Sequence[int] | Tensor | None = None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention output, as `F.scaled_dot_product_attention` gives it, and the head-reduced attention map.

    ``P = softmax(q k^T * scale + bias)``, ``out = P v``, ``map = mean_h P`` (or max, min, or each head's P). No
    [B, H, M, N] tensor is made unless ``heads="each"`` asks for it. The output is differentiable with respect to q, k,
    v, bias and sinks; the map is detached. Forward-mode derivatives are not supported.

    With ``softcap`` the scores are ``softcap * tanh(q k^T * scale / softcap)``, before the bias and the masks. With
    ``sinks`` the head's sink is one more key, whose value is zero: ``P = softmax(cat(scores + bias, sink))`` without
    its last column, so that a row's weights sum to less than 1.

    A `TorchFunctionMode` or a tensor subclass with `__torch_function__` sees the call as those of torch's own
    functions: q, k and v by position, every other argument by keyword.

    Args:
        q: [B, H, M, D] float16, bfloat16, float32 (float64 on the eager backend), any strides. (Native copies what has
            a last stride other than 1, and takes no float16.)
        k, v: [B, Hk, N, D] and [B, Hk, N, Dv], of q's dtype and device; H is a multiple of Hk (grouped queries).
        bias: broadcastable to [B, H, M, N]: a float tensor is added to the scores, a boolean one says True = attend.
            Or [P, ...] where P divides B: it repeats, item b has bias[b % P], as for the windows of several images.
            Below -5e4 it hides a key, so `finfo.min` of any dtype and -1e9 do as minus infinity, and a row of nothing
            else is zero, where SDPA attends by what digits are left.
        is_causal: row i sees the keys 0..i, also where M != N (as in SDPA).
        scale: of the scores; ``D ** -0.5`` unless given.
        softcap: the bound of the scores' magnitude, above 0; None: no bound. Only the eager backend has it: "auto"
            takes eager then.
        sinks: [H] floating point on q's device, any float dtype: the logit of each head's sink.
        heads: "mean", "max", "min" over the heads, or "each".
        rows: indices in -M..M-1 of the queries whose map is wanted, or one index; others cost nothing. None: all.
        backend: "triton", "hopper" (the same with kernels for H100 and H200 where they take the inputs; never run on a
            GPU yet), "native" (a C++ kernel for CPUs), "eager" (plain torch, any device), or "auto": Triton on GPUs and
            native on CPUs wherever they can take the inputs, else eager. A named backend never falls back to eager.
        attn_mask: the bias by SDPA's name, instead of `bias`.
        enable_gqa: as SDPA's, without effect: grouped queries are always allowed.
        dropout_p: as SDPA's, 0 only: attnx has no dropout.

    Returns:
        out [B, H, M, Dv] in q's dtype, and the map, float32: [B, M, N], [B, R, N] for R rows, [B, H, M, N] for each.
        A row whose keys are all masked is zero in both. Without keys (N = 0) the output is zero. The map of the same
        inputs has the same bits every time. (On CPUs one of 32 MB and more can't be resized in place.)

    Raises:
        ValueError: a shape, dtype, device, index or name that doesn't fit; says what was expected and what came.
        NotImplementedError: the named backend can't take these inputs; says every reason.

    Example:
        >>> q = k = v = torch.randn(2, 4, 5, 16)
        >>> out, amap = attnx.attention(q, k, v)
        >>> out.shape, amap.shape
        (torch.Size([2, 4, 5, 16]), torch.Size([2, 5, 5]))
    """
    check_dropout(dropout_p)
    if has_torch_function((q, k, v)):
        options: dict[str, Any] = dict(
            bias=one_bias(bias, attn_mask), is_causal=is_causal, scale=scale, softcap=softcap, sinks=sinks, heads=heads
        )
        return handle_torch_function(attention, (q, k, v), q, k, v, **options, rows=rows, backend=backend)
    usual = sinks is None and attn_mask is None and rows is None
    key = signature(q, k, v, bias, is_causal, scale, softcap, heads, backend) if usual else None
    checked = known(key)
    if checked is not None:
        if checked.prepared is not None:
            return checked.prepared(q, k, v, bias)
        scale, cap = checked.scale, checked.softcap
        return operators.attention.direct(q, k, v, bias, is_causal, scale, cap, heads, None, backend)
    q, k, v = cast_as_sdpa(q, k, v)
    bias = check_tensors(q, k, v, bias, heads, attn_mask)
    index = row_index(rows, q.shape[2], q.device)
    scale, cap, name = resolve_scale(scale, q), resolve_softcap(softcap), check_backend(backend)
    if sinks is None:
        out, amap = differentiable(operators.attention, q, k, v, bias, is_causal, scale, cap, heads, index, name)
        if key is not None:
            remember(key, Scores(q, k, bias, is_causal, scale, cap), v, heads, name)
        return out, amap.detach()
    check_sinks(sinks, q)
    out, lse = differentiable(operators.attention_lse, q, k, v, bias, is_causal, scale, cap, name)
    out, lse = with_sinks(out, lse, sinks)
    q, k, bias = q.detach(), k.detach(), None if bias is None else bias.detach()
    return out, operators.attention_map(q, k, bias, is_causal, scale, cap, heads, index, lse, name)


def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: str = "mean",
    rows: int | Sequence[int] | Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The head-reduced attention map alone; arguments, result and errors as in `attention`. Detached.

    Args:
        lse: [B, H, M] float32, the natural log-sum-exp of the scaled, biased scores, where a forward pass has it
            already; the weights are then ``exp(scores - lse)``. A row without keys has minus or plus infinity. With
            sinks it is `attention_lse`'s of the same sinks; without it sinks cost the attention of all rows.

    Example:
        >>> q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16)
        >>> attnx.attention_map(q, k, rows=[0], heads="max").shape
        torch.Size([2, 1, 7])
    """
    (q, k), v = cast_as_sdpa(q, k), None
    bias = check_tensors(q, k, v, bias, heads, attn_mask)
    index = row_index(rows, q.shape[2], q.device)
    check_float32("lse", lse, q.shape[:3], q.device)
    scale, cap, name = resolve_scale(scale, q), resolve_softcap(softcap), check_backend(backend)
    q, k = q.detach(), k.detach()
    bias, lse = (None if t is None else t.detach() for t in (bias, lse))
    lse = lse_with_sinks(q, k, bias, is_causal, scale, cap, sinks, lse, name)
    return operators.attention_map(q, k, bias, is_causal, scale, cap, heads, index, lse, name)


def attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention output, and the log-sum-exp of every row of scores: with q and k all that a map is made of.

    ``lse = log sum_j exp(q k_j^T * scale + bias_j)``, natural; then ``P = exp(q k^T * scale + bias - lse)``. It costs
    what attention costs, in time and memory. Arguments and errors as in `attention`. With ``sinks`` the sum includes
    the head's sink, ``lse = log(exp(sink) + sum_j exp(score_j))``: the weights are still ``exp(score - lse)``.

    Returns:
        out [B, H, M, Dv] in q's dtype, differentiable as `attention`'s, and lse [B, H, M] float32, detached. A row
        whose keys are all masked has zero and minus infinity; so has every row without keys (N = 0). With sinks its
        lse is the sink.

    Example:
        >>> q = k = v = torch.randn(2, 4, 5, 16)
        >>> out, lse = attnx.attention_lse(q, k, v)
        >>> torch.allclose(lse, (q @ k.mT / 4).logsumexp(-1), atol=1e-5)
        True
    """
    q, k, v = cast_as_sdpa(q, k, v)
    bias = check_tensors(q, k, v, bias, "mean", attn_mask)
    if sinks is not None:
        check_sinks(sinks, q)
    scale, cap, name = resolve_scale(scale, q), resolve_softcap(softcap), check_backend(backend)
    out, lse = differentiable(operators.attention_lse, q, k, v, bias, is_causal, scale, cap, name)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out, lse.detach().float()


def vecmat(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A row vector times the mean map, without the map: ``r @ mean_h softmax(q k^T * scale + bias)``. Detached.

    A step of rollout in memory linear in M and N. It gives what the rows pass on, not the map's entries: the row sums
    that are left when small entries are discarded are out of its reach. (The plain row sums are known: the share of
    heads in which the row has a key, ``(lse > -inf).mean(1)``, unless there are sinks.)

    Args:
        r: [B, M] float32, any strides. A row whose r is zero passes nothing on, not even a NaN among its weights.
        q, k, bias, is_causal, scale, softcap, sinks, backend, attn_mask, enable_gqa: as in `attention`.
        lse: [B, H, M] float32 as `attention_lse` gives it, with the same sinks, where it is known already.

    Returns:
        [B, N] float32. Rows whose keys are all masked pass nothing on; zero for M = 0. The same inputs give the same
        bits every time.

    Raises:
        ValueError, NotImplementedError: as in `attention`.

    Example:
        >>> r, q, k = torch.rand(2, 5), torch.randn(2, 4, 5, 16), torch.randn(2, 4, 7, 16)
        >>> passed = attnx.vecmat(r, q, k)
        >>> torch.allclose(passed, (r[:, None] @ attnx.attention_map(q, k))[:, 0], atol=1e-5)
        True
    """
    q, k = cast_as_sdpa(q, k)
    bias = check_tensors(q, k, None, bias, "mean", attn_mask)
    check_float32("r", r, (q.shape[0], q.shape[2]), q.device)
    check_float32("lse", lse, q.shape[:3], q.device)
    scale, cap, name = resolve_scale(scale, q), resolve_softcap(softcap), check_backend(backend)
    r, q, k = r.detach(), q.detach(), k.detach()
    bias, lse = (None if t is None else t.detach() for t in (bias, lse))
    lse = lse_with_sinks(q, k, bias, is_causal, scale, cap, sinks, lse, name)
    return operators.vecmat(r, q, k, bias, is_causal, scale, cap, lse, name)


def gradient_map(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: str = "mean",
    clamp: bool = True,
    rows: int | Sequence[int] | Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The map weighted by its own gradient, heads fused: what Grad-CAM and Chefer's relevance are made of. Detached.

    ``P = softmax(q k^T * scale + bias)``, ``dP = grad v^T``, the gradient of P, and ``map = mean_h max(dP, 0) P``,
    clamped head by head before they are fused. Neither P nor dP of all heads exists at any time.

    Args:
        grad: [B, H, M, Dv] in q's dtype, the gradient of a scalar with respect to the attention's output.
        q, k, v, bias, is_causal, scale, softcap, sinks, rows, backend, attn_mask, enable_gqa: as in `attention`.
        heads: how the products of the heads are fused: "mean", "max", "min", or "each".
        clamp: False: ``mean_h dP P``, signs and all.
        lse: [B, H, M] float32 as `attention_lse` gives it, with the same sinks, where it is known already.

    Returns:
        float32, shaped as `attention`'s map. A row whose keys are all masked is zero.

    Raises:
        ValueError, NotImplementedError: as in `attention`.

    Reference:
        Chefer et al., "Generic Attention-model Explainability", https://arxiv.org/abs/2103.15679 (equation 5); ALBEF's
        Grad-CAM, https://github.com/salesforce/ALBEF/blob/main/visualization.ipynb

    Example:
        >>> q = k = v = torch.randn(2, 4, 5, 16)
        >>> attnx.gradient_map(torch.randn(2, 4, 5, 16), q, k, v).shape
        torch.Size([2, 5, 5])
    """
    q, k, v = cast_as_sdpa(q, k, v)
    bias = check_tensors(q, k, v, bias, heads, attn_mask)
    check_gradient(grad, q, v)
    index = row_index(rows, q.shape[2], q.device)
    check_float32("lse", lse, q.shape[:3], q.device)
    grad, q, k, v = (t.detach() for t in (grad, q, k, v))
    bias, lse = (None if t is None else t.detach() for t in (bias, lse))
    scale, cap, name = resolve_scale(scale, q), resolve_softcap(softcap), check_backend(backend)
    lse = lse_with_sinks(q, k, bias, is_causal, scale, cap, sinks, lse, name)
    return operators.gradient_map(grad, q, k, v, bias, is_causal, scale, cap, heads, clamp, index, lse, name)
