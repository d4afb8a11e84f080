"""`nn.MultiheadAttention`: its function, `F.multi_head_attention_forward`, run with another attention inside."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MHA = F.multi_head_attention_forward
_NEED_WEIGHTS = 14  # its place among the arguments


def multi_head_attention(sdpa: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What `F.multi_head_attention_forward` of these arguments gives, the attention itself computed by `sdpa`.

    Asked for its weights, the original function computes them: they are its own, with their graph.
    """
    needs = kwargs.get("need_weights", args[_NEED_WEIGHTS] if len(args) > _NEED_WEIGHTS else True)
    if len(args) > _NEED_WEIGHTS:
        out, weights = _with(sdpa)(*args[:_NEED_WEIGHTS], False, *args[_NEED_WEIGHTS + 1 :], **kwargs)
    else:
        out, weights = _with(sdpa)(*args, **{**kwargs, "need_weights": False})
    if needs:
        # Nobody is to hear this attention a second time.
        with torch._C.DisableTorchFunction():
            weights = MHA(*args, **kwargs)[1]
    return out, weights


def _with(sdpa: Callable[..., Tensor]) -> FunctionType:
    """The same code with other globals: it calls `sdpa`, and does not ask modes and subclasses a second time."""
    names = {**MHA.__globals__, "scaled_dot_product_attention": sdpa, "has_torch_function": lambda tensors: False}
    clone = FunctionType(MHA.__code__, names, MHA.__name__, MHA.__defaults__, MHA.__closure__)
    clone.__kwdefaults__ = MHA.__kwdefaults__
    return clone
