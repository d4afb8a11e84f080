"""Helpers for adapters that replace the forward of a known class of a package by one that calls SDPA.

A class is recognised by its name, its package, and the arguments and the names that its forward uses, never by a
version. A class whose forward takes other arguments, or uses more or fewer names, is left as it is.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from attnx.trace.adapters.rewriting import Rewrite


@dataclass(frozen=True)
class Known:
    """A class that computes its own softmax.

    Attributes:
        package: what the name of the class's module starts with.
        arguments: names of the forward's arguments without self; one tuple for each variant.
        needs: names that the forward uses.
        may_use: names that the forward of some versions uses.
        forward: the function to bind, which calls SDPA.
    """

    package: str
    arguments: tuple[tuple[str, ...], ...]
    needs: frozenset[str]
    may_use: frozenset[str]
    forward: Callable[..., Any]


def blocks(table: Mapping[str, Known]) -> dict[str, Rewrite]:
    """{class name: function that gives the forward to bind} of a table {class name: the class}."""

    def rewritten(name: str, forward: FunctionType) -> Callable[..., Any] | None:
        return table[name].forward if _is_known(forward, table[name]) else None

    return dict.fromkeys(table, rewritten)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of a call of the forward of the module's class; keyword arguments of any other name included."""
    signature, others = _signature(type(module).forward)
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    return {**given.pop(others, {}), **given}


@cache
def _signature(forward: Callable[..., Any]) -> tuple[inspect.Signature, str]:
    """The signature of a forward, and the name of its argument for other keywords; "" if it has none."""
    signature = inspect.signature(forward)
    others = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    return signature, "".join(others)


@cache
def _is_known(forward: FunctionType, known: Known) -> bool:
    """True if `known` describes the forward."""
    function = inspect.unwrap(forward)
    if not isinstance(function, FunctionType) or not function.__module__.startswith(known.package):
        return False
    uses = set(function.__code__.co_names)
    arguments = tuple(inspect.signature(function).parameters)[1:]
    return arguments in known.arguments and known.needs <= uses <= known.needs | known.may_use
