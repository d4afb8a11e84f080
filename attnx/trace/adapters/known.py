"""Classes that compute their own softmax, and the forwards that stand in for theirs.

A class is recognised by its name and package, and by the arguments, the names and the operators that its forward uses,
never by a version; no foreign code is imported. A class whose forward takes other arguments, or uses more or fewer
names, is left as it is.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from attnx.trace.adapters.rewriting import arithmetic
from attnx.trace.adapters.switches import bind, own_forward_only


@dataclass(frozen=True, eq=False)
class Known:
    """A class whose forward has a counterpart here.

    Attributes:
        name: of the class.
        arguments: names of the forward's arguments without self; one tuple for each variant.
        needs: names that the forward uses.
        may_use: further names that it may use.
        forward: the function to bind, which calls SDPA.
        package: what the name of the forward's module starts with.
        operators: number of uses of each binary operator, as from `arithmetic`; None: any.
        test: a further condition on the forward; None: none.
    """

    name: str
    arguments: tuple[tuple[str, ...], ...]
    needs: Set[str]
    may_use: Set[str]
    forward: Callable[..., Any]
    package: str = ""
    operators: Mapping[str, int] | None = None
    test: Callable[[FunctionType], bool] | None = None


def bind_known(modules: Iterable[nn.Module], table: Mapping[str, Sequence[Known]]) -> list[Callable[[], None]]:
    """Bind forwards that call SDPA to the known blocks of a model; returns functions that undo it.

    Args:
        modules: of the model, those whose class has a name of the table.
        table: {class name: known classes of that name}; the first that describes a block is taken.
    """
    undo: list[Callable[[], None]] = []
    found: dict[Any, Known | None] = {}  # by class
    for module in modules:
        kind: Any = type(module)
        if kind not in found:
            classes = table.get(kind.__name__, ())
            found[kind] = next((known for known in classes if _describes(known, kind.forward)), None)
        known = found[kind]
        if known is not None and own_forward_only(module):
            undo.append(bind(module, known.forward))
    return undo


@cache
def _describes(known: Known, forward: Callable[..., Any]) -> bool:
    """True if `known` describes a forward."""
    function = inspect.unwrap(forward)
    if not isinstance(function, FunctionType) or not (function.__module__ or "").startswith(known.package):
        return False
    uses, arguments = set(function.__code__.co_names), tuple(inspect.signature(function).parameters)[1:]
    if arguments not in known.arguments or not known.needs <= uses <= known.needs | known.may_use:
        return False
    if known.operators is not None and arithmetic(function) != known.operators:
        return False
    return known.test is None or known.test(function)


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
