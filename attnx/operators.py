"""The operators of `torch.ops.attnx`: what `attnx.ops` calls once its arguments are checked.

Each has a fake kernel, which says the shapes and strides of its results, so that `torch.compile(fullgraph=True)` takes
it; those that give an output have a gradient too. Empty inputs are answered here, before any backend.
"""

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnx.backends import eager
from attnx.dispatch import operator
from attnx.reducers import Heads

_MISSING: set[str] = set()  # backends of which was said that they are
_OF_DEVICE = {"cuda": "triton", "cpu": "native"}


def implementation(backend: str, q: Tensor, v: Tensor | None = None, needs: str = "attention") -> Any:
    """The module of `attnx.backends` that answers; for "auto" the device's own, or eager where that can't.

    needs: the function that it must have.

    Raises:
        NotImplementedError: a named backend can't take these inputs; says every reason.

    Warns:
        UserWarning: once, where the device's own backend is missing something it needs, such as a compiler.
    """
    name = _OF_DEVICE.get(q.device.type, "eager") if backend == "auto" else backend
    if name == "eager":
        return eager
    try:
        module = import_module(f"attnx.backends.{name}")
        reasons = module.limits(q, v) if hasattr(module, needs) else [f"it has no {needs}"]
    except ImportError as error:
        reasons = [str(error)]
        if backend == "auto":
            _warn_once(name, str(error))
    if reasons and backend != "auto":
        raise NotImplementedError(f"backend={backend!r} can't take these inputs: {'; '.join(reasons)}")
    return eager if reasons else module


def _warn_once(backend: str, why: str) -> None:
    if backend not in _MISSING:
        _MISSING.add(backend)
        warnings.warn(f"attnx: plain torch answers in place of the {backend} backend, more slowly: {why}", stacklevel=3)


@operator("attention")
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
    return implementation(backend, q, v).attention(q, k, v, bias, is_causal, scale, kind, rows)


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


@operator("attention_map")
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
    return implementation(backend, q).attention_map(q, k, bias, is_causal, scale, kind, rows, lse)


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


@operator("attention_lse")
def _lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if 0 in q.shape or k.shape[2] == 0:
        out, lse = _lse_fake(q, k, v, bias, is_causal, scale, backend)
        return out.zero_(), lse.fill_(-torch.inf)
    return implementation(backend, q, v).attention_lse(q, k, v, bias, is_causal, scale)


@_lse.register_fake
def _lse_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("vecmat")
def _vecmat(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    if 0 in q.shape or k.shape[2] == 0:
        return _vecmat_fake(r, q, k, bias, is_causal, scale, lse, backend).zero_()
    return implementation(backend, q).vecmat(r, q, k, bias, is_causal, scale, lse)


@_vecmat.register_fake
def _vecmat_fake(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    return r.new_empty(r.shape[0], k.shape[2])


@operator("gradient_map")
def _gradient_map(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: str,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    kind = Heads.parse(heads)
    if 0 in q.shape or 0 in v.shape:
        return _gradient_map_fake(grad, q, k, v, bias, is_causal, scale, heads, clamp, rows, lse, backend).zero_()
    _check_range(rows, q.shape[2])
    module = implementation(backend, q, v, "gradient_map")
    return module.gradient_map(grad, q, k, v, bias, is_causal, scale, kind, clamp, rows, lse)


@_gradient_map.register_fake
def _gradient_map_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: str,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    return _map_fake(q, k, bias, is_causal, scale, heads, rows, lse, backend)


@operator("attention_backward")
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.is_causal, ctx.scale, *_ = inputs
    ctx.save_for_backward(q, k, v, bias, output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    none = (None,) * len(ctx.needs_input_grad)
    if grad is None:
        return none
    q, k, v, bias, out = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.attnx.attention_backward(grad, q, k, v, bias, out, ctx.is_causal, ctx.scale)
    return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None, *none[4:]


for _operator in (_attention, _lse):
    _operator.register_autograd(_backward, setup_context=_setup_context)


def _check_range(rows: Tensor | None, m: int) -> None:
    """On a CPU; a GPU is not waited for: there a bad index fails as a device-side assertion where rows are gathered."""
    if rows is None or rows.numel() == 0 or rows.device.type != "cpu":
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= m:
        raise ValueError(f"rows: expected indices in 0..{m - 1}; got {low}..{high}")
