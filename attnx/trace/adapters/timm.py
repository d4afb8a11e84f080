"""Adapter for timm: each attention module reads its `fused_attn` flag, which is set when the block is built."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from attnx.trace.adapters.switches import On
from attnx.trace.structure import Structure


def use_sdpa(structure: Structure) -> list[Callable[[], None]]:
    """Set `fused_attn` where it is False; returns functions that restore it."""
    undo: list[Callable[[], None]] = []
    module: Any
    for _, module in structure.where(_has_flag):
        # vars() instead of getattr: a failed lookup by nn.Module.__getattr__ takes microseconds.
        if vars(module).get("fused_attn", getattr(type(module), "fused_attn", True)) is False:
            module.fused_attn = On(True)
            undo.append(partial(setattr, module, "fused_attn", False))
    return undo


def _has_flag(module: nn.Module) -> bool:
    return "fused_attn" in vars(module) or hasattr(type(module), "fused_attn")
