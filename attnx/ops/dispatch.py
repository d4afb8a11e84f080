"""Functions as operators of `torch.ops.attnx`, and the shorter way to them where nobody needs an operator."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_FUNCTIONS: dict[str, Callable[..., Any]] = {}  # what the operators do, by name
_PLAIN = (Tensor, torch.nn.Parameter)


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function, which will run with autocast off, as `torch.ops.attnx.<name>`."""

    def register(function: Callable[..., Any]) -> Any:
        given = _FUNCTIONS[name] = _as_given(function)
        return torch.library.custom_op(f"attnx::{name}", mutates_args=())(given)

    return register


def call(name: str, *args: Any) -> Any:
    """`torch.ops.attnx.<name>` of these arguments; the function itself where nothing would see the difference.

    Where there is no gradient, tracer, transform or mode, the dispatcher only takes time: on a GPU's host a tenth of a
    millisecond, as long as the attention of a small batch.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(arg, Tensor) and type(arg) not in _PLAIN for arg in args)
    ):
        return getattr(torch.ops.attnx, name)(*args)
    return _FUNCTIONS[name](*args)


def _as_given(function: Callable[P, R]) -> Callable[P, R]:
    """The function with autocast off: what is cast was cast before, and inside it would round the weights."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
