"""Calls that were checked before: inputs of the same shapes, dtypes and devices are not checked again.

The checks take longer than the attention of a small image.
"""

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_MOST = 1024  # calls; when there are more, all are forgotten
_KNOWN: dict[Hashable, tuple[float, float]] = {}


def signature(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *options: str | float | bool | None
) -> Hashable | None:
    """What the checks of a call depend on; None if it must be checked, or may be observed: by a gradient, for example.

    Args:
        q, k, v, bias: any objects, as the user gave them.
        options: all other arguments.
    """
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    if torch.compiler.is_compiling() or not all(type(t) in _PLAIN for t in tensors):
        return None
    if (
        (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(q.device.type)
        or (bias is not None and bias.dim() != 4)
        or not all(isinstance(option, str | float | int | None) for option in options)
    ):
        return None
    return (options, *[x for t in tensors for x in (t.shape, t.dtype, t.device)])


def known(key: Hashable | None) -> tuple[float, float] | None:
    """(scale, softcap) of a checked call with this signature; None if there was none."""
    return None if key is None else _KNOWN.get(key)


def remember(key: Hashable | None, scale: float, softcap: float) -> None:
    """Note that a call with this signature passed its checks."""
    if key is not None:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = scale, softcap
