"""The functions that attention modules call, and `F.multi_head_attention_forward` with another attention inside."""

from collections.abc import Callable
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SDPA = F.scaled_dot_product_attention
MHA = F.multi_head_attention_forward
_TAKES = signature(MHA)


def multi_head_attention(
    sdpa: Callable[..., Tensor], exact: bool, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The result of `F.multi_head_attention_forward` with `sdpa` as its attention.

    Asked for its weights, the original function computes them: they are its own, with their graph.

    Args:
        sdpa: is asked for the attention, in the place of `F.scaled_dot_product_attention`.
        exact: the original function's output is given where it is run for the weights; else that of `sdpa`.
    """
    given = _TAKES.bind(*args, **kwargs).arguments
    if not given.get("need_weights", True):
        return _with(sdpa)(**given)
    # With weights the mask counts and the hint does not: it would hide keys that add_bias_kv and add_zero_attn append.
    out, _ = _with(sdpa)(**{**given, "need_weights": False, "is_causal": False})
    # Nobody is to hear this attention a second time.
    with torch._C.DisableTorchFunction():
        plain, weights = MHA(*args, **kwargs)
    return plain if exact else out, weights


def _with(sdpa: Callable[..., Tensor]) -> FunctionType:
    """The same code with other globals: it calls `sdpa`, and does not ask modes and subclasses a second time."""
    names = {**MHA.__globals__, "scaled_dot_product_attention": sdpa, "has_torch_function": lambda tensors: False}
    clone = FunctionType(MHA.__code__, names, MHA.__name__, MHA.__defaults__, MHA.__closure__)
    clone.__kwdefaults__ = MHA.__kwdefaults__
    return clone
