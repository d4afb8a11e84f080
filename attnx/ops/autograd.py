"""Gradients of `attention` and `attention_lse`, also inside the transforms of `torch.func`.

Importing it registers them with torch. Forward-mode and second derivatives raise.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnx.ops import operators
from attnx.ops.registration import Operator

P = ParamSpec("P")
R = TypeVar("R")


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
    backward = _Backward.apply if _is_transformed() else operators.attention_backward.registered
    dq, dk, dv, dbias = backward(*args)
    return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None, *none[4:]


def _backward_without_map(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad, None)


operators.attention.register_autograd(_backward_without_map, setup_context=_setup_context)
operators.attention_lse.register_autograd(_backward, setup_context=_setup_context)


def _transformed(operator: Operator[..., Any], backward: Callable[..., Any]) -> type[torch.autograd.Function]:
    """The operator for the transforms of `torch.func`, which take no gradient of a custom operator."""

    def forward(*args: Any) -> Any:
        return operator.registered(*args)

    functions = {"forward": forward, "setup_context": _setup_context, "backward": backward}
    body = {name: staticmethod(function) for name, function in functions.items()} | {"generate_vmap_rule": True}
    return type("Transformed", (torch.autograd.Function,), body)


class _Backward(torch.autograd.Function):
    """`operators.attention_backward` for the transforms of `torch.func`; it has no gradient itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return operators.attention_backward.registered(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("attnx: second derivatives are not supported; use F.scaled_dot_product_attention")


_TRANSFORMED = {
    operators.attention: _transformed(operators.attention, _backward_without_map),
    operators.attention_lse: _transformed(operators.attention_lse, _backward),
}


def differentiable(operator: Operator[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The operator's result for these positional arguments, differentiable also inside `torch.func`'s transforms.

    Raises:
        NotImplementedError: an argument has a forward-mode tangent.
    """
    if forward_ad._current_level >= 0:  # also inside `torch.func.jvp`
        _check_no_tangents(args)
    if _is_transformed():
        result: R = _TRANSFORMED[operator].apply(*args)
        return result
    return operator(*args, **kwargs)


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _check_no_tangents(args: tuple[Any, ...]) -> None:
    """Raise where torch itself would give the outputs of a custom operator no tangent, silently."""
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
