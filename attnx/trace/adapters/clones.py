"""Clones of a block's own forward that call another `scaled_dot_product_attention`."""

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


class Clones:
    """Clones of the forwards of blocks, in which `sdpa` computes the attention; blocks of a class share one.

    A clone has the same code and other globals: the names of `F.scaled_dot_product_attention`,
    `F.multi_head_attention_forward` and transformers' table of attention functions refer to `sdpa`. There is no clone
    if the code contains none of these names, so that another function may call SDPA; if the forward is not a plain
    function of the class; or if it writes globals.
    """

    def __init__(self, sdpa: Callable[..., Any]) -> None:
        self.sdpa = sdpa
        self._made: dict[Any, Callable[..., Any] | str] = {}  # by the forward of the class

    def of(self, block: nn.Module) -> Callable[..., Any] | str:
        """The clone of the block's forward, or the reason that there is none."""
        function = getattr(type(block), "forward", None)
        if not own_forward_only(block):
            return "its forward was replaced on the instance"
        if function not in self._made:
            self._made[function] = self._new(function)
        return self._made[function]

    def _new(self, function: Any) -> Callable[..., Any] | str:
        if not isinstance(function, FunctionType):
            return "its forward is not a plain function of its class"
        if _writes_globals(function.__code__):
            return "its forward writes global variables"
        return _with_sdpa(function, self.sdpa) or "its forward does not call F.scaled_dot_product_attention itself"


@cache
def _writes_globals(code: CodeType) -> bool:
    """True if the code writes globals: a clone has globals of its own, so its writes would be lost."""
    return any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(code))


def _with_sdpa(function: FunctionType, sdpa: Callable[..., Any]) -> FunctionType | None:
    packed = partial(multi_head_attention, sdpa, True)
    functional = _ModuleWith(F, scaled_dot_product_attention=sdpa, multi_head_attention_forward=packed)
    neural = _ModuleWith(nn, functional=functional)
    # The fast path of nn.MultiheadAttention calls neither function, so it is switched off.
    slow = _ModuleWith(torch.backends, mha=_ModuleWith(torch.backends.mha, get_fastpath_enabled=lambda: False))
    others = _ModuleWith(torch, nn=neural, backends=slow)
    replacements = {id(SDPA): sdpa, id(F): functional, id(nn): neural, id(torch): others}
    names = function.__code__.co_names
    known = {name: function.__globals__[name] for name in names if name in function.__globals__}
    replaced: dict[str, Any] = {}
    if "ALL_ATTENTION_FUNCTIONS" in known:
        replaced = {"ALL_ATTENTION_FUNCTIONS": _Table(known["ALL_ATTENTION_FUNCTIONS"], sdpa)}
    elif SDPA.__name__ in names or MHA.__name__ in names:
        replaced = {name: replacements[id(value)] for name, value in known.items() if id(value) in replacements}
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


class _ModuleWith:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Table:
    """transformers' table of attention functions, with `sdpa` in place of SDPA."""

    def __init__(self, table: Any, sdpa: Callable[..., Any]) -> None:
        self.table = table
        self.sdpa = sdpa
        self._made: dict[FunctionType, Callable[..., Any]] = {}

    def __getitem__(self, name: str) -> Any:
        return self._replaced(self.table[name])

    def get_interface(self, name: str, default: Any) -> Any:
        return self._replaced(self.table.get_interface(name, default))

    def _replaced(self, function: Any) -> Any:
        if not isinstance(function, FunctionType):
            return function
        if function not in self._made:
            self._made[function] = _with_sdpa(function, self.sdpa) or function
        return self._made[function]
