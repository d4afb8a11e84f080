"""Flags that a capture switches on for its time. A copy of the module (copy.deepcopy, torch.save) has the old value."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

DOES_NOTHING = (getattr, (nullcontext(), "__exit__"))
"""A `__reduce__` value: the hook becomes, in a copy of its module, a function that takes anything and gives None."""


class On(int):
    """True, in the place of False."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (False,)


class Off(int):
    """False, in the place of True."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (True,)


class Instead(str):
    """A name in the place of another one."""

    before: str

    def __new__(cls, name: str, before: str) -> "Instead":
        self = super().__new__(cls, name)
        self.before = before
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.before,)


class Bound:
    """A forward bound to one module, to be set in its `vars`. A copy of the module has its class's own forward."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.__func__ = function
        self.__self__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Asked before the copy has its attributes: its class's.
        return getattr, (self.__self__, "forward")


def bind(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Runs the function as the module's forward; call what is returned to undo it."""
    bound = Bound(function, module)
    # Not by setattr: nn.Module's takes longer than some layers.
    vars(module)["forward"] = bound
    return partial(_unbind, module, bound)


def own_forward_only(module: nn.Module) -> bool:
    """True if the module runs its class's own forward: nobody has set another one on the instance."""
    forward = vars(module).get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _unbind(module: nn.Module, bound: Bound) -> None:
    if vars(module).get("forward") is bound:
        del vars(module)["forward"]
