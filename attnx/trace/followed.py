"""The modules that a capture follows with hooks: all but those of torch and timm that can't attend."""

import dis
from collections import Counter
from collections.abc import Collection
from functools import cache
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from attnx.trace.grids import is_grid_module
from attnx.trace.inputs import is_norm
from attnx.trace.layers import attending_names, is_attention
from attnx.trace.quiet import calls_sdpa_alone, is_quiet
from attnx.trace.structure import Structure

NORMS = frozenset({F.layer_norm, F.rms_norm})
"""Functions of norms. The modules that return their results need no hook where a capture sees the functions."""

_PACKAGES = ("torch.nn.modules.", "timm.layers.")
# Modules that contain others, and attend only if one of these does.
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict", "Mlp", "GluMlp", "SwiGLU")
# Names in the code of a forward that attends.
_ATTENDS = frozenset({"softmax", "matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"})


def is_followed(module: nn.Module) -> bool:
    """True unless the module can't attend, nor any module inside it: a linear layer, a norm, an MLP of timm.

    Convolutions and pools are followed, so that what they mix is noted by their name.
    """
    kind = type(module)
    if is_attention(module) or is_grid_module(module) or not kind.__module__.startswith(_PACKAGES):
        return True
    children = list(module.children())
    if children and kind.__name__ not in _CONTAINERS:
        return True
    if not children and not _is_plain(module):
        return True
    return any(is_followed(child) for child in children)


def quiet_modules(structure: Structure) -> frozenset[str]:
    """Names of the followed modules whose own code can't attend, see `attnx.trace.quiet`."""
    return frozenset(
        name for name, module in structure.where(is_followed) if not is_attention(module) and is_quiet(module)
    )


def sdpa_modules(structure: Structure) -> frozenset[str]:
    """Names of the attention layers whose code calls SDPA and does nothing else that a capture notes."""
    layers = structure.derived(attending_names)
    return frozenset(
        name for name, module in structure.where(is_followed) if name in layers and calls_sdpa_alone(module)
    )


def norms_to_hook(structure: Structure) -> tuple[str, ...]:
    """Names of the norms that are not followed and need a hook.

    They don't return the result of one of NORMS; or they are in a quiet module, whose functions a capture does not see,
    and which has several followed modules that may run side by side.
    """
    followed = {name for name, _ in structure.where(is_followed)}
    quiet = structure.derived(quiet_modules)
    inside = Counter(_around(name, followed) for name in followed if name)
    found = []
    for name, module in structure.where(is_norm):
        around = _around(name, followed)
        unseen = around in quiet and inside[around] > 1
        if name not in followed and (unseen or not _returns_norm(type(module).forward)):
            found.append(name)
    return tuple(found)


def _around(name: str, followed: Collection[str]) -> str:
    """Name of the innermost followed module around a module."""
    while name:
        name = name.rpartition(".")[0]
        if name in followed:
            break
    return name


def _is_plain(module: nn.Module) -> bool:
    """True for a module without others inside whose class can't attend, nor change in place what it is given."""
    inplace = bool(getattr(module, "inplace", False)) and not type(module).__module__.startswith("torch.")
    return not inplace and not _attends(type(module).forward)


@cache
def _attends(forward: Any) -> bool:
    """True for a forward without Python code, and for one that uses softmax or multiplies matrices."""
    function = unwrap(forward)
    if not isinstance(function, FunctionType):
        return True
    steps = dis.get_instructions(function)
    products = any(step.opname == "BINARY_OP" and step.argrepr in ("@", "@=") for step in steps)
    return products or not _ATTENDS.isdisjoint(function.__code__.co_names)


@cache
def _returns_norm(forward: Any) -> bool:
    """True for the forward of torch's LayerNorm and RMSNorm, and of timm's LayerNorm."""
    function = unwrap(forward)
    named = f"{function.__module__}.{function.__qualname__}"
    return forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or named == "timm.layers.norm.LayerNorm.forward"
