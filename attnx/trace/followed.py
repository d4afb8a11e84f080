"""The modules that a capture follows with hooks: all but those of torch and timm that can't attend."""

import dis
from functools import cache
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from attnx.trace.inputs import is_norm
from attnx.trace.layers import is_attention

NORMS = frozenset({F.layer_norm, F.rms_norm})
"""Functions of norms. The modules that return their results need no hook, because a capture sees the functions."""

_PACKAGES = ("torch.nn.modules.", "timm.layers.")
# Modules that contain others, and attend only if one of these does.
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict", "Mlp", "GluMlp", "SwiGLU")
# Names in the code of a forward that may attend.
_ATTENDS = frozenset({"softmax", "matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"})


def is_followed(module: nn.Module) -> bool:
    """True unless the module can't attend, nor any module inside it: a linear layer, a norm, an MLP of timm."""
    kind = type(module)
    if is_attention(module) or not kind.__module__.startswith(_PACKAGES):
        return True
    children = list(module.children())
    if children and kind.__name__ not in _CONTAINERS:
        return True
    if not children and _may_attend(kind.forward):
        return True
    return any(is_followed(child) for child in children)


def is_norm_to_hook(module: nn.Module) -> bool:
    """True for a norm that is not followed, and that does not return the result of one of NORMS."""
    return is_norm(module) and not is_followed(module) and not _returns_norm(type(module).forward)


@cache
def _may_attend(forward: Any) -> bool:
    """True for a forward without Python code, and for one that uses softmax or multiplies matrices."""
    function = unwrap(forward)
    if not isinstance(function, FunctionType):
        return True
    products = any(
        step.opname == "BINARY_OP" and step.argrepr in ("@", "@=") for step in dis.get_instructions(function)
    )
    return products or not _ATTENDS.isdisjoint(function.__code__.co_names)


@cache
def _returns_norm(forward: Any) -> bool:
    """True for the forward of torch's LayerNorm and RMSNorm, and of timm's LayerNorm."""
    function = unwrap(forward)
    named = f"{function.__module__}.{function.__qualname__}"
    return forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or named == "timm.layers.norm.LayerNorm.forward"
