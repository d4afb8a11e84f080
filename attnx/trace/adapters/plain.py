"""Adapter for attention that returns only its output: forwards that call SDPA instead of computing the softmax.

This is the attention of timm 0.4, which the code of DeiT, MAE, T2T-ViT and CrossViT copies. `dino` supports the form
that returns the probabilities, too. See `rewriting` for how blocks are recognised.

Reference:
    https://github.com/huggingface/pytorch-image-models/blob/v0.4.12/timm/models/vision_transformer.py
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnx.trace.adapters.rewriting import (
    VIT_NEEDS,
    VIT_USES,
    arithmetic,
    drops,
    output,
    project,
    returns_pair,
)


@cache
def _rewritten(name: str, forward: FunctionType) -> Callable[..., Any] | None:
    """The forward to bind in place of a class's own; None if that is unknown."""
    arguments = tuple(inspect.signature(forward).parameters)[1:]
    known = VIT_NEEDS <= set(forward.__code__.co_names) <= VIT_USES | {"unbind"}
    if arguments == ("x",) and known and arithmetic(forward) == {"@": 2, "*": 1} and not returns_pair(forward):
        return _attention
    return None


def _attention(self: Any, x: Tensor) -> Tensor:
    """Output of the attention [B, N, C]."""
    if drops(self.attn_drop) or not isinstance(self.scale, int | float):
        result: Tensor = type(self).forward(self, x)
        return result
    q, k, v = project(self, x)
    return output(self, F.scaled_dot_product_attention(q, k, v, scale=self.scale))


BLOCKS = dict.fromkeys(("Attention",), _rewritten)
