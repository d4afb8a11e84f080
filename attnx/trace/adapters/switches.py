"""Temporary values of flags during a capture; a copy of the module (copy.deepcopy, torch.save) gets the old value."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

DOES_NOTHING = (getattr, (nullcontext(), "__exit__"))
"""A `__reduce__` value: in a copy of a module, its hook becomes a function of any arguments that returns None."""


class On(int):
    """True in place of False."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (False,)


class Off(int):
    """False in place of True."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (True,)


class Instead(str):
    """A name in place of another one, `before`."""

    before: str

    def __new__(cls, name: str, before: str) -> "Instead":
        """The name, with the name that it replaces."""
        self = super().__new__(cls, name)
        self.before = before
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.before,)


class Bound:
    """A forward bound to one module and stored in its `vars`; a copy of the module has its class's own forward."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.__func__ = function
        self.__self__ = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the module."""
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Evaluated before the copy has its attributes, so this is the class's forward.
        return getattr, (self.__self__, "forward")


def bind(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Use the function as the module's forward; returns a function that undoes it."""
    bound = Bound(function, module)
    # vars() instead of setattr: nn.Module.__setattr__ takes longer than some layers.
    vars(module)["forward"] = bound
    return partial(_unbind, module, bound)


def own_forward_only(module: nn.Module) -> bool:
    """True if the module runs its class's own forward, not one set on the instance."""
    forward = vars(module).get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _unbind(module: nn.Module, bound: Bound) -> None:
    if vars(module).get("forward") is bound:
        del vars(module)["forward"]
