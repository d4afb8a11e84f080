"""Adapter for CrossViT's cross-attention: a forward that calls SDPA instead of computing the softmax itself.

The only query is the class token, so maps are [B, 1, N]. IBM's class and timm's are supported. See `known` for how
blocks are recognised.

Reference:
    https://github.com/IBM/CrossViT, models/crossvit.py
"""

import dis
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnx.trace.adapters.known import Known
from attnx.trace.adapters.rewriting import drops, output

_NEEDS = {"wq", "wk", "wv", "num_heads", "scale", "softmax", "attn_drop", "proj", "proj_drop"}
_MAY_USE = {"permute", "reshape", "shape", "transpose"}


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


BLOCKS = (Known("CrossAttention", (("x",),), _NEEDS, _MAY_USE, _attention, operators={"@": 2, "*": 1}, test=_slices),)
