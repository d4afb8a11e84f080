"""Adapter for CrossViT's cross-attention: a forward that calls SDPA instead of computing the softmax itself.

The only query is the class token, so maps are [B, 1, N]. IBM's class and timm's are supported. See `rewriting` for how
blocks are recognised.

Reference:
    https://github.com/IBM/CrossViT, models/crossvit.py
"""

import dis
import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnx.trace.adapters.rewriting import arithmetic, drops, output

_NEEDS = {"wq", "wk", "wv", "num_heads", "scale", "softmax", "attn_drop", "proj", "proj_drop"}
_USES = _NEEDS | {"permute", "reshape", "shape", "transpose"}


@cache
def _rewritten(name: str, forward: FunctionType) -> Callable[..., Any] | None:
    """The forward to bind in place of a class's own; None if that is unknown."""
    arguments = tuple(inspect.signature(forward).parameters)[1:]
    known = _NEEDS <= set(forward.__code__.co_names) <= _USES
    if arguments == ("x",) and known and _slices(forward) and arithmetic(forward) == {"@": 2, "*": 1}:
        return _attention
    return None


def _slices(function: FunctionType) -> bool:
    """True if a function takes a slice. A similar block without one has a query for each token."""
    steps = dis.get_instructions(function)
    return any(step.opname in ("BUILD_SLICE", "BINARY_SLICE") or isinstance(step.argval, slice) for step in steps)


def _attention(self: Any, x: Tensor) -> Tensor:
    """Output of the attention [B, 1, C] of the class token to all tokens x [B, N, C]."""
    if drops(self.attn_drop) or not isinstance(self.scale, int | float):
        result: Tensor = type(self).forward(self, x)
        return result
    q, k, v = (
        project(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        for project, tokens in ((self.wq, x[:, :1]), (self.wk, x), (self.wv, x))
    )
    return output(self, F.scaled_dot_product_attention(q, k, v, scale=self.scale))


BLOCKS = dict.fromkeys(("CrossAttention",), _rewritten)
