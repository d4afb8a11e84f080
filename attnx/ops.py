"""The functional API: attention that also returns its head-reduced map.

Two custom operators (`torch.ops.attnx.attention`, `torch.ops.attnx.attention_map`) with fake kernels and a gradient,
so that `torch.compile(fullgraph=True)` takes a function that uses them; validation and the choice of a backend.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnx.backends import eager
from attnx.reducers import Heads

BACKENDS = ("auto", "triton", "eager")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
    rows: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention output, as `F.scaled_dot_product_attention` gives it, and the head-reduced attention map.

    ``P = softmax(q k^T * scale + bias)``, ``out = P v``, ``map = mean_h P`` (or max, min, or each head's P). No
    [B, H, M, N] tensor is made unless ``heads="each"`` asks for it. The output is differentiable with respect to q, k,
    v and bias; the map is detached.

    Args:
        q: [B, H, M, D] float16, bfloat16, float32 (float64 on the eager backend), any strides.
        k: [B, Hk, N, D] of the same dtype and device; H is a multiple of Hk (grouped queries).
        v: [B, Hk, N, Dv] likewise.
        bias: broadcastable to [B, H, M, N]: a float tensor is added to the scores, a boolean one says True = attend.
            Below -1e30 it hides a key, so `finfo.min` does as minus infinity (SDPA attends evenly where it is alone).
        is_causal: row i sees the keys 0..i, also where M != N (as in SDPA).
        scale: of the scores; ``D ** -0.5`` unless given.
        heads: "mean", "max", "min" over the heads, or "each".
        rows: indices in 0..M-1 of the query rows whose map is wanted; the others cost nothing. None: all.
        backend: "triton", "eager" (plain torch, any device), or "auto": Triton on GPUs wherever it can take the
            inputs, else eager. A named backend never falls back.

    Returns:
        out [B, H, M, Dv] in q's dtype, and the map, float32: [B, M, N], [B, R, N] for R rows, [B, H, M, N] for each.
        A row whose keys are all masked is zero in both. Without keys (N = 0) the output is zero. The map of the same
        inputs has the same bits every time.

    Raises:
        ValueError: a shape, dtype, device, index or name that doesn't fit; says what was expected and what came.
        NotImplementedError: the named backend can't take these inputs; says every reason.
    """
    q, k, v = _autocast(q, k, v)
    bias = _check(q, k, v, bias, is_causal, heads)
    index = _row_index(rows, q.shape[2], q.device)
    scale = _scale(scale, q)
    out, amap = torch.ops.attnx.attention(q, k, v, bias, is_causal, scale, heads, index, _choose(backend, q, v))
    return out, amap.detach()


def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
    rows: Sequence[int] | Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The head-reduced attention map alone; arguments, result and errors as in `attention`. Detached.

    Args:
        lse: [B, H, M] float32, the natural log-sum-exp of the scaled, biased scores, where a forward pass has it
            already; the weights are then ``exp(scores - lse)``. A row without keys has minus or plus infinity.
    """
    (q, k), v = _autocast(q, k), None
    bias = _check(q, k, v, bias, is_causal, heads)
    index = _row_index(rows, q.shape[2], q.device)
    if lse is not None and (lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device != q.device):
        came = f"{lse.dtype} {list(lse.shape)} on {lse.device}"
        raise ValueError(f"lse: expected float32 {list(q.shape[:3])} on {q.device}; got {came}")
    name = _choose(backend, q, v)
    q, k = q.detach(), k.detach()
    bias, lse = (None if t is None else t.detach() for t in (bias, lse))
    return torch.ops.attnx.attention_map(q, k, bias, is_causal, _scale(scale, q), heads, index, lse, name)


@torch.library.custom_op("attnx::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: str,
    rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kind = Heads.parse(heads)
    if 0 in q.shape or k.shape[2] == 0:
        out, amap = _attention_fake(q, k, v, bias, is_causal, scale, heads, rows, backend)
        return out.zero_(), amap.zero_()
    _check_range(rows, q.shape[2])
    impl = _implementation(backend)
    if rows is None:
        return impl.attention(q, k, v, bias, is_causal, scale, kind)
    amap = impl.attention_map(q, k, bias, is_causal, scale, kind, rows, None)
    return impl.attention_output(q, k, v, bias, is_causal, scale), amap


@_attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: str,
    rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, _map_fake(q, k, bias, is_causal, scale, heads, rows, None, backend)


@torch.library.custom_op("attnx::attention_map", mutates_args=())
def _map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: str,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    kind = Heads.parse(heads)
    if 0 in q.shape or k.shape[2] == 0:
        return _map_fake(q, k, bias, is_causal, scale, heads, rows, lse, backend).zero_()
    _check_range(rows, q.shape[2])
    return _implementation(backend).attention_map(q, k, bias, is_causal, scale, kind, rows, lse)


@_map.register_fake
def _map_fake(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: str,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    m = q.shape[2] if rows is None else rows.shape[0]
    planes = q.shape[:2] if heads == "each" else q.shape[:1]
    return q.new_empty((*planes, m, k.shape[2]), dtype=torch.float32)


@torch.library.custom_op("attnx::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbias = eager.attention_backward(grad, q, k, v, bias, out, is_causal, scale)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if bias is None or bias.dtype == torch.bool:
        return dq, dk, dv, q.new_empty(0)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    return dq, dk, dv, dbias


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, ctx.is_causal, ctx.scale, *_ = inputs
    ctx.save_for_backward(q, k, v, bias, output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    none = (None,) * 9
    if grad is None:
        return none
    q, k, v, bias, out = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.attnx.attention_backward(grad, q, k, v, bias, out, ctx.is_causal, ctx.scale)
    return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None, *none[4:]


_attention.register_autograd(_backward, setup_context=_setup_context)


def _implementation(backend: str):  # type: ignore[no-untyped-def]
    if backend == "eager":
        return eager
    from attnx.backends import triton

    return triton


def _choose(backend: str, q: Tensor, v: Tensor | None) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "eager" or (backend == "auto" and q.device.type != "cuda"):
        return "eager"
    try:
        reasons = _implementation("triton").limits(q, v)
    except ImportError as error:
        reasons = [str(error)]
    if reasons and backend == "triton":
        raise NotImplementedError(f"backend='triton' can't take these inputs: {'; '.join(reasons)}")
    return "eager" if reasons else "triton"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the inputs are cast as SDPA's are."""
    for name, t in zip("qkv", tensors, strict=False):
        if not isinstance(t, Tensor):
            raise ValueError(f"{name}: expected a tensor; got {type(t).__name__}")
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _scale(scale: float | None, q: Tensor) -> float:
    return max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)


def _check(q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, is_causal: bool, heads: str) -> Tensor | None:
    """Raises ValueError for inputs that don't fit together; gives the bias as a 4-D tensor."""
    Heads.parse(heads)
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, t in named.items():
        if t.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, heads, tokens, head dim]; got {list(t.shape)}")
        if not t.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype; got {t.dtype}")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name}: expected q's {q.dtype} on {q.device}; got {t.dtype} on {t.device}")
    B, H, M, D = q.shape
    Hk, N = k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: expected [{B}, heads, tokens, {D}] to fit q {list(q.shape)}; got {list(k.shape)}")
    if Hk == 0 or H % Hk:
        raise ValueError(f"k: expected a number of heads that divides q's {H}; got {Hk}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected [{B}, {Hk}, {N}, head dim] to fit k {list(k.shape)}; got {list(v.shape)}")
    if bias is None:
        return None
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise ValueError(f"bias: expected a float or bool dtype; got {bias.dtype}")
    if bias.device != q.device:
        raise ValueError(f"bias: expected device {q.device}; got {bias.device}")
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, (B, H, M, N), strict=True)):
        raise ValueError(f"bias: expected a shape that broadcasts to {[B, H, M, N]}; got {list(bias.shape)}")
    return bias.reshape(shape)


def _row_index(rows: Sequence[int] | Tensor | None, m: int, device: torch.device) -> Tensor | None:
    if rows is None:
        return None
    if not isinstance(rows, Tensor):
        if not isinstance(rows, Sequence) or not all(isinstance(i, int) and 0 <= i < m for i in rows):
            raise ValueError(f"rows: expected a sequence of integers in 0..{m - 1}; got {rows!r}")
        return torch.tensor(rows, dtype=torch.int64, device=device)
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32) or rows.device != device:
        raise ValueError(
            f"rows: expected a 1-D integer tensor on {device}; got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    return rows.to(torch.int64)


def _check_range(rows: Tensor | None, m: int) -> None:
    """On a GPU without waiting for it: a bad index then fails as a device-side assertion."""
    if rows is None or rows.numel() == 0:
        return
    if rows.device.type == "cpu":
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= m:
            raise ValueError(f"rows: expected indices in 0..{m - 1}; got {low}..{high}")
    else:
        torch._assert_async(((rows >= 0) & (rows < m)).all())
