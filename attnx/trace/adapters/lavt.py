"""Adapter for LAVT's attention from pixels to words (PWAM): a forward that calls SDPA instead of computing the softmax.

The queries are the pixels of a stage and the keys are the words, so a map is [B, pixels, words]. The scale is that of
all heads together, ``key_channels ** -0.5``, and padded words get the bias -10000. See `known` for how blocks are
recognised.

Reference:
    https://github.com/yz93/LAVT-RIS, lib/backbone.py
"""

from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnx.trace.adapters.known import Known
from attnx.trace.adapters.masks import as_bias

_USES = {"F", "W", "contiguous", "f_key", "f_query", "f_value", "key_channels", "matmul", "num_heads", "permute",
         "reshape", "size", "softmax", "torch", "unsqueeze", "value_channels"}  # fmt: skip
# The scale's exponent and the bias of padding. A block with other numbers is left.
_NUMBERS = {-0.5, 10000.0}


def _attention(self: Any, x: Tensor, l: Tensor, l_mask: Tensor) -> Tensor:
    """Output [B, pixels, C] of pixels x [B, pixels, C] over words l [B, C', T]; `l_mask` [B, T, 1]: 0 for padding."""
    mask = l_mask.mT
    q = self.f_query(x.mT).unflatten(1, (self.num_heads, -1)).mT
    k, v = ((convolution(l) * mask).unflatten(1, (self.num_heads, -1)).mT for convolution in (self.f_key, self.f_value))
    bias = as_bias((1e4 * mask - 1e4)[:, None], q)
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=self.key_channels**-0.5)
    fused: Tensor = self.W(out.mT.flatten(1, 2)).mT
    return fused


def _has_numbers(forward: FunctionType) -> bool:
    return set(forward.__code__.co_consts) >= _NUMBERS


BLOCKS = (
    Known("SpatialImageLanguageAttention", (("x", "l", "l_mask"),), _USES, frozenset(), _attention, test=_has_numbers),
)
