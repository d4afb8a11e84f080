"""A block's own forward, run with another `scaled_dot_product_attention`: nobody needs to listen for the call."""

import dis
from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attnx.trace.adapters.mha import MHA, SDPA, multi_head_attention
from attnx.trace.adapters.switches import own_forward_only


def own_forward(module: nn.Module, sdpa: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that is the module's forward, but for the attention, which `sdpa` computes.

    It is the same code, with other globals: the names by which it reaches `F.scaled_dot_product_attention`,
    `F.multi_head_attention_forward`, or transformers' table of attention functions, lead to `sdpa`. None where the code
    names none of them, so that somebody else may call it, or where the forward is no plain function of the class.
    """
    function = getattr(type(module), "forward", None)
    if not own_forward_only(module) or not isinstance(function, FunctionType) or _writes_globals(function.__code__):
        return None
    return _with_sdpa(function, sdpa)


@cache
def _writes_globals(code: CodeType) -> bool:
    """The clone's globals are its own: what it wrote there nobody else would see."""
    return any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(code))


def _with_sdpa(function: FunctionType, sdpa: Callable[..., Any]) -> FunctionType | None:
    packed = partial(multi_head_attention, sdpa, True)
    functional = _Instead(F, scaled_dot_product_attention=sdpa, multi_head_attention_forward=packed)
    neural = _Instead(nn, functional=functional)
    # nn.MultiheadAttention's fast path calls neither function.
    slow = _Instead(torch.backends, mha=_Instead(torch.backends.mha, get_fastpath_enabled=lambda: False))
    others = _Instead(torch, nn=neural, backends=slow)
    instead = {id(SDPA): sdpa, id(F): functional, id(nn): neural, id(torch): others}
    names = function.__code__.co_names
    known = {name: function.__globals__[name] for name in names if name in function.__globals__}
    replaced: dict[str, Any] = {}
    if "ALL_ATTENTION_FUNCTIONS" in known:
        replaced = {"ALL_ATTENTION_FUNCTIONS": _Table(known["ALL_ATTENTION_FUNCTIONS"], sdpa)}
    elif SDPA.__name__ in names or MHA.__name__ in names:
        replaced = {name: instead[id(value)] for name, value in known.items() if id(value) in instead}
    if not replaced:
        return None
    clone = FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


class _Instead:
    """A module, some of whose names are others."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Table:
    """transformers' table of attention functions, of which those that call SDPA end in ours."""

    def __init__(self, table: Any, sdpa: Callable[..., Any]) -> None:
        self.table = table
        self.sdpa = sdpa

    def __getitem__(self, name: str) -> Any:
        return self._ours(self.table[name])

    def get_interface(self, name: str, default: Any) -> Any:
        return self._ours(self.table.get_interface(name, default))

    def _ours(self, function: Any) -> Any:
        return (isinstance(function, FunctionType) and _with_sdpa(function, self.sdpa)) or function
