"""The functions that attention modules call, and `F.multi_head_attention_forward` with another SDPA inside."""

from collections.abc import Callable
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SDPA = F.scaled_dot_product_attention
MHA = F.multi_head_attention_forward
_SIGNATURE = signature(MHA)


def multi_head_attention(
    sdpa: Callable[..., Tensor], exact: bool, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The result of `F.multi_head_attention_forward` with `sdpa` as its attention.

    With need_weights=True the original function computes the weights, with their graph.

    Args:
        sdpa: replaces `F.scaled_dot_product_attention`.
        exact: with need_weights=True, return the original function's output instead of that of `sdpa`.
        args, kwargs: of `F.multi_head_attention_forward`.
    """
    bound = _SIGNATURE.bind(*args, **kwargs).arguments
    if not bound.get("need_weights", True):
        result: tuple[Tensor, Tensor | None] = _clone_with(sdpa)(**bound)
        return result
    # is_causal is a hint that need_weights=True ignores. Here it would mask keys of add_bias_kv and add_zero_attn.
    out, _ = _clone_with(sdpa)(**{**bound, "need_weights": False, "is_causal": False})
    # Function modes are disabled, so that the attention is not intercepted a second time.
    with torch._C.DisableTorchFunction():
        plain, weights = MHA(*args, **kwargs)
    return plain if exact else out, weights


def _clone_with(sdpa: Callable[..., Tensor]) -> FunctionType:
    """A clone of the function with other globals: it calls `sdpa` and skips function modes and subclasses."""
    names = {**MHA.__globals__, "scaled_dot_product_attention": sdpa, "has_torch_function": lambda tensors: False}
    clone = FunctionType(MHA.__code__, names, MHA.__name__, MHA.__defaults__, MHA.__closure__)
    clone.__kwdefaults__ = MHA.__kwdefaults__
    return clone
