"""Registration of a function as an operator of `torch.ops.attnx`."""

from collections.abc import Callable
from functools import update_wrapper, wraps
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (Tensor, torch.nn.Parameter)


class Operator(Generic[P, R]):
    """A function that is registered as `torch.ops.attnx.<its name>`, and runs with autocast off.

    A call goes through torch's dispatcher only where something would see the difference: a gradient, a tracer, a
    transform or a mode. The dispatcher takes a tenth of a millisecond on a GPU's host, as long as the attention of a
    small batch.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        update_wrapper(self, function)
        self.direct = _without_autocast(function)
        definition = torch.library.custom_op(f"attnx::{function.__name__}", mutates_args=())(self.direct)
        self.register_fake, self.register_autograd = definition.register_fake, definition.register_autograd
        self.registered = getattr(torch.ops.attnx, function.__name__)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the registered operator if the dispatcher is needed, else the function."""
        if is_observed(args):
            result: R = self.registered(*args, **kwargs)
            return result
        return self.direct(*args, **kwargs)


def is_observed(args: tuple[Any, ...]) -> bool:
    """True if torch's dispatcher would do more than call the function."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(arg, Tensor) and type(arg) not in _PLAIN for arg in args)
    )


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function with autocast off: inputs are cast already, and inside it would round the weights."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
