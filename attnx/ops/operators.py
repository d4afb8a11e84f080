"""The operators of `torch.ops.attnx`: what `attnx.ops` calls once its arguments are checked.

Each has a fake kernel, which says the shapes and strides of its results, so that `torch.compile(fullgraph=True)` takes
it; those that give an output have a gradient too. Empty inputs are answered here, before any backend.
"""

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnx.ops.backends import eager
from attnx.ops.dispatch import call, operator
from attnx.ops.reducers import Reduction

_MISSING: set[str] = set()  # backends of which was said that they are
_OF_DEVICE = {"cuda": "triton", "cpu": "native"}


def implementation(
    backend: str, q: Tensor, v: Tensor | None = None, needs: str = "attention", softcap: float = 0.0
) -> Any:
    """The module of `attnx.ops.backends` that answers; for "auto" the device's own, or eager where that can't.

    needs: the function that it must have.
    softcap: above 0 where scores are capped, which only eager can.

    Raises:
        NotImplementedError: a named backend can't take these inputs; says every reason.

    Warns:
        UserWarning: once, where the device's own backend is missing something it needs, such as a compiler.
    """
    name = _OF_DEVICE.get(q.device.type, "eager") if backend == "auto" else backend
    if name == "eager" or (softcap and backend == "auto"):
        return eager
    try:
        module = import_module(f"attnx.ops.backends.{name}")
        reasons = module.limits(q, v) if hasattr(module, needs) else [f"it has no {needs}"]
        if softcap:
            reasons = [*reasons, f"it has no softcap ({softcap:g}); backend='eager' has"]
    except ImportError as error:
        reasons = [str(error)]
        if backend == "auto":
            _warn_once(name, str(error))
    if reasons and backend != "auto":
        raise NotImplementedError(f"backend={backend!r} can't take these inputs: {'; '.join(reasons)}")
    return eager if reasons else module


def _given(softcap: float) -> tuple[float, ...]:
    """The last argument of the eager backend's functions, where scores are capped; the other backends have none."""
    return (softcap,) if softcap else ()


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
    softcap: float,
    heads: str,
    rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kind = Reduction.parse(heads)
    if 0 in q.shape or k.shape[2] == 0:
        out, amap = _attention_fake(q, k, v, bias, is_causal, scale, softcap, heads, rows, backend)
        return out.zero_(), amap.zero_()
    _check_range(rows, q.shape[2])
    module, more = implementation(backend, q, v, softcap=softcap), _given(softcap)
    return module.attention(q, k, v, bias, is_causal, scale, kind, rows, *more)


@_attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    heads: str,
    rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, _map_fake(q, k, bias, is_causal, scale, softcap, heads, rows, None, backend)


@operator("attention_map")
def _map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    heads: str,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    kind = Reduction.parse(heads)
    if 0 in q.shape or k.shape[2] == 0:
        return _map_fake(q, k, bias, is_causal, scale, softcap, heads, rows, lse, backend).zero_()
    _check_range(rows, q.shape[2])
    module, more = implementation(backend, q, softcap=softcap), _given(softcap)
    return module.attention_map(q, k, bias, is_causal, scale, kind, rows, lse, *more)


@_map.register_fake
def _map_fake(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if 0 in q.shape or k.shape[2] == 0:
        out, lse = _lse_fake(q, k, v, bias, is_causal, scale, softcap, backend)
        return out.zero_(), lse.fill_(-torch.inf)
    module, more = implementation(backend, q, v, softcap=softcap), _given(softcap)
    return module.attention_lse(q, k, v, bias, is_causal, scale, *more)


@_lse.register_fake
def _lse_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    # Of float64 inputs float64, for what `attnx.ops` makes of it; the callers of `ops.attention_lse` see float32.
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@operator("vecmat")
def _vecmat(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    if 0 in q.shape or k.shape[2] == 0:
        return _vecmat_fake(r, q, k, bias, is_causal, scale, softcap, lse, backend).zero_()
    module, more = implementation(backend, q, softcap=softcap), _given(softcap)
    return module.vecmat(r, q, k, bias, is_causal, scale, lse, *more)


@_vecmat.register_fake
def _vecmat_fake(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
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
    softcap: float,
    heads: str,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    kind = Reduction.parse(heads)
    if 0 in q.shape or 0 in v.shape:
        call = (grad, q, k, v, bias, is_causal, scale, softcap, heads, clamp, rows, lse, backend)
        return _gradient_map_fake(*call).zero_()
    _check_range(rows, q.shape[2])
    module, more = implementation(backend, q, v, "gradient_map", softcap), _given(softcap)
    return module.gradient_map(grad, q, k, v, bias, is_causal, scale, kind, clamp, rows, lse, *more)


@_gradient_map.register_fake
def _gradient_map_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    heads: str,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
    backend: str,
) -> Tensor:
    return _map_fake(q, k, bias, is_causal, scale, softcap, heads, rows, lse, backend)


@operator("attention_backward")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    is_causal: bool,
    scale: float,
    softcap: float = 0.0,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbias = eager.attention_backward(grad, q, k, v, bias, out, is_causal, scale, softcap, dlse)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@_attention_backward.register_fake
def _attention_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    is_causal: bool,
    scale: float,
    softcap: float = 0.0,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if bias is None or bias.dtype == torch.bool:
        return dq, dk, dv, q.new_empty(0)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    return dq, dk, dv, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.is_causal, ctx.scale, ctx.softcap, *_ = inputs
    ctx.save_for_backward(q, k, v, bias, output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * len(ctx.needs_input_grad)
    if grad is None and dlse is None:
        return none
    q, k, v, bias, out = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    args = (grad, q, k, v, bias, out, ctx.is_causal, ctx.scale, ctx.softcap, dlse)
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    dq, dk, dv, dbias = (_Backward.apply if transformed else torch.ops.attnx.attention_backward)(*args)
    return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None, *none[4:]


def _backward_without_map(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad, None)


_attention.register_autograd(_backward_without_map, setup_context=_setup_context)
_lse.register_autograd(_backward, setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """`torch.ops.attnx.attention` for the transforms of `torch.func`, which take no gradient of a custom operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.attnx.attention(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward_without_map)


class _Lse(torch.autograd.Function):
    """`torch.ops.attnx.attention_lse` likewise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.attnx.attention_lse(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _Backward(torch.autograd.Function):
    """`torch.ops.attnx.attention_backward` likewise; it has no gradient itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.attnx.attention_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("attnx: second derivatives are not supported; use F.scaled_dot_product_attention")


_TRANSFORMED = {"attention": _Attention, "attention_lse": _Lse}


def differentiable(name: str, *args: Any) -> Any:
    """`dispatch.call` of "attention" or "attention_lse", also inside the transforms of `torch.func`.

    Raises:
        NotImplementedError: an argument has a forward-mode tangent.
    """
    if forward_ad._current_level >= 0:  # also inside `torch.func.jvp`
        _check_no_tangents(args)
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return _TRANSFORMED[name].apply(*args)
    return call(name, *args)


def _check_no_tangents(args: tuple[Any, ...]) -> None:
    """Torch itself would give the outputs of a custom operator no tangent, in silence."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or []
    levels = {level.level() for level in stack if level.key() == functorch.TransformType.Jvp}
    for t in args:
        if not isinstance(t, Tensor):
            continue
        dual = forward_ad.unpack_dual(t).tangent is not None
        # A tensor is wrapped once for every transform that sees it, the innermost outside.
        while not dual and functorch.is_functorch_wrapped_tensor(t):
            dual = functorch.maybe_get_level(t) in levels
            t = functorch.get_unwrapped(t)
        if dual:
            raise NotImplementedError(
                "attnx: forward-mode derivatives are not supported; use reverse mode, or F.scaled_dot_product_attention"
            )


def _check_range(rows: Tensor | None, m: int) -> None:
    """On a CPU; a GPU is not waited for: there a bad index fails as a device-side assertion where rows are gathered."""
    if rows is None or rows.numel() == 0 or rows.device.type != "cpu":
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= m:
        raise ValueError(f"rows: expected indices in 0..{m - 1}; got {low}..{high}")
