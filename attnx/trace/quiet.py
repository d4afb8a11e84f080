"""Modules whose own code can't attend: a capture does not watch the functions that they call.

To watch them costs a few microseconds for each function that runs. Most blocks of a transformer only call other modules
and add their results. A module is quiet if every name in the code of its forward is known to do nothing that a capture
notes: to attend, to multiply matrices, to convolve, to change a tensor in place. What can't be told is not quiet.
"""

import builtins
import dis
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from inspect import unwrap
from itertools import pairwise
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from attnx.trace.adapters.huggingface import AS_EAGER

_NOTED = frozenset({
    "softmax", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention",
    "multi_head_attention_forward", "attention", "forward", "get_interface",
    "conv1d", "conv2d", "conv3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
    "add_", "sub_", "mul_", "copy_", "__setitem__", "__iadd__", "__isub__", "__imul__",
    "getattr", "eval", "exec", "vars", "__dict__", "partial",
})  # fmt: skip
"""Names of functions that a capture notes, and of those that find functions by other means."""

_SDPA = frozenset({"scaled_dot_product_attention"})
# Names in the branch of a forward that does not run where timm's flag says that SDPA does.
_UNFUSED = frozenset({"softmax", "matmul", "@"})
_TABLE = frozenset({"ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward", "()"})
_NOTHING = frozenset[str]()

_CONSTANTS = (str, int, float, bool, type(None), torch.dtype, torch.device, logging.Logger)
_NEVER_CALLED = frozenset({bool, int, float, str, tuple, list, dict, set, OrderedDict, type(None)})
_DATA = (*_CONSTANTS, type, nn.Module, torch.Tensor, tuple, list, dict, set, frozenset)


class Names(NamedTuple):
    """The names in the code of a forward.

    quiet: it uses nothing that a capture notes. attributes: all names in it.
    """

    quiet: bool
    attributes: frozenset[str]


def calls_sdpa_alone(module: nn.Module) -> bool:
    """True if the code of the module's class calls SDPA by its name, and does nothing else that a capture notes.

    It may look SDPA up in the table of transformers. It may also compute its own softmax where SDPA is switched off,
    see `sdpa_is_on`.
    """
    kind: Any = type(module)
    package = kind.__module__.partition(".")[0]
    allowed = _SDPA | (_UNFUSED if package == "timm" else _TABLE if package == "transformers" else _NOTHING)
    return not names_of(kind, allowed).attributes.isdisjoint(_SDPA | _TABLE) and is_quiet(module, allowed)


def sdpa_is_on(module: nn.Module) -> bool:
    """True if a module that passes `calls_sdpa_alone` calls SDPA now, by the flag of timm or the configuration."""
    package, own = type(module).__module__.partition(".")[0], vars(module)
    if package == "timm":
        return bool(own.get("fused_attn"))
    if package == "transformers":
        return getattr(own.get("config"), "_attn_implementation_internal", None) in ("sdpa", AS_EAGER)
    return True


def is_quiet(module: nn.Module, allowed: frozenset[str] = _NOTHING) -> bool:
    """True if the code of the module's class can't attend, nor does it call methods of the modules inside it.

    Its attributes may hold functions, see `holds_functions`.

    allowed: names that its forward may use. "@" stands for products, "()" for calls of variables.
    """
    kind: Any = type(module)
    quiet, attributes = names_of(kind, allowed)
    if not quiet or holds_functions(module):
        return False
    for child in module.modules():
        own: Any = type(child)
        if child is not module and not attributes.isdisjoint(_methods(own)):
            return False
        for name, value in vars(child).items():
            if child is not module and name in attributes and callable(value):
                return False
            # An object of another kind, such as a configuration, may hold functions.
            if not isinstance(value, _DATA) and any(callable(getattr(value, used, None)) for used in attributes):
                return False
    return True


def holds_functions(module: nn.Module) -> bool:
    """True if an attribute of the module itself can be called, such as a forward of its own."""
    for value in vars(module).values():
        if type(value) not in _NEVER_CALLED and callable(value) and not isinstance(value, nn.Module | type):
            return True
    return False


@cache
def names_of(kind: Any, allowed: frozenset[str] = _NOTHING) -> Names:
    """The names in the forward of a class, and in the methods and functions that it calls; see `is_quiet`."""
    forward = getattr(kind, "forward", None)  # a scripted module's class has none
    if forward is nn.Sequential.forward:
        return Names(True, frozenset())  # it calls its modules, one after the other
    names: set[str] = set()
    quiet = forward is not None and _is_quiet(forward, kind, names, set(), allowed)
    return Names(quiet, frozenset(names))


def _is_quiet(
    function: Any, kind: type[nn.Module], names: set[str], seen: set[Any], allowed: frozenset[str] = _NOTHING
) -> bool:
    """True if a function of a class, and what it calls, does nothing that is noted; adds the names it uses."""
    function = unwrap(function)
    if function in seen:
        return True
    seen.add(function)
    if not isinstance(function, FunctionType) or set(function.__code__.co_freevars) - {"__class__"}:
        return False
    for code in _codes(function.__code__):
        used = set(code.co_names)
        names |= used
        if not _NOTED.isdisjoint(used - allowed) or _writes_or_multiplies(code, "@" in allowed):
            return False
        if "()" not in allowed and _calls_a_variable(code):
            return False
        methods = [getattr(kind, name, None) for name in used if not hasattr(nn.Module, name)]
        found = _global_names(code) - allowed
        values = [function.__globals__.get(name, getattr(builtins, name, None)) for name in found]
        for value in (*methods, *values):
            if isinstance(value, property):
                value = value.fget
            if isinstance(value, FunctionType):
                # Torch's functions have the names that are noted; its modules' methods may call them.
                known = value in values and (value.__module__ or "").partition(".")[0] == "torch"
                if not known and not _is_quiet(value, kind, names, seen):
                    return False
            elif not _is_harmless(value):
                return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _global_names(code: CodeType) -> set[str]:
    return {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _writes_or_multiplies(code: CodeType, may_multiply: bool) -> bool:
    """True for code with ``x += y`` or ``x[i] = y``, or with ``x @ y`` unless it may multiply."""
    for step in dis.get_instructions(code):
        if step.opname == "STORE_SUBSCR":
            return True
        writes = step.opname == "BINARY_OP" and (step.argrepr.endswith("=") or step.argrepr.startswith("@"))
        if writes and not (may_multiply and step.argrepr == "@"):
            return True
    return False


def _calls_a_variable(code: CodeType) -> bool:
    """True for code that may call a local variable or an item of one, which may be any function."""
    steps = [step.opname for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    variables = ("LOAD_FAST", "LOAD_DEREF", "BINARY_SUBSCR")
    return any("PUSH_NULL" in pair and any(name.startswith(variables) for name in pair) for pair in pairwise(steps))


def _is_harmless(value: Any) -> bool:
    """True for a class, a constant, a function of C, and the modules of torch and Python."""
    if isinstance(value, ModuleType):
        package = value.__name__.partition(".")[0]
        return package == "torch" or package in sys.stdlib_module_names
    return isinstance(value, (type, BuiltinFunctionType, *_CONSTANTS))


@cache
def _methods(kind: Any) -> frozenset[str]:
    """Names of the functions of a class that nn.Module does not have."""
    own = {name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, FunctionType)}
    return frozenset(own - set(dir(nn.Module)))
