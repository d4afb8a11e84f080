"""Calls of `attention` that were checked before: inputs of the same shapes, strides and dtypes are not checked again.

The checks, and the choice of a backend, take longer than the attention of a small image.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_OPTIONS = frozenset({str, float, int, bool, type(None)})
_MOST = 1024  # calls; when there are more, all are forgotten
_KNOWN: dict[Hashable, "Known"] = {}
_tracing_state, _dispatch_modes = torch._C._get_tracing_state, torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


class Known(NamedTuple):
    """The result of the checks of a call.

    scale, softcap: as the operators take them. prepared: computes output and map from q, k, v and bias of such a call;
        None: no backend has prepared the call.
    """

    scale: float
    softcap: float
    prepared: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None


def signature(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *options: str | float | bool | None
) -> Hashable | None:
    """The properties of a call that its checks depend on.

    None if it must be checked, or if it may be observed, for example by a gradient.

    Args:
        q, k, v, bias: any objects, as the user gave them.
        options: all other arguments.
    """
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    if torch.compiler.is_compiling():
        return None
    if not (_PLAIN.issuperset(map(type, tensors)) and _OPTIONS.issuperset(map(type, options))):
        return None
    device = q.device
    if (
        (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        or _tracing_state() is not None
        or _dispatch_modes() > 0
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled(device.type)
        or (bias is not None and bias.dim() != 4)
    ):
        return None
    key: tuple[Hashable, ...] = (options, device, q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, k.device)
    key += (v.shape, v.stride(), v.dtype, v.device)
    return key if bias is None else (*key, bias.shape, bias.stride(), bias.dtype, bias.device)


def known(key: Hashable | None) -> Known | None:
    """The result of the checks of a call with this signature; None if there was none."""
    return None if key is None else _KNOWN.get(key)


def remember(key: Hashable, scores: Scores, v: Tensor, heads: str, backend: str) -> None:
    """Note that a call with this signature passed its checks, and prepare the next ones."""
    prepared = None
    if scores.q.device.type == "cpu" and backend in ("auto", "native") and not scores.is_empty:
        from attnx.ops.backends import native

        prepared = native.prepare(scores, v, Reduction.parse(heads))
    if len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    _KNOWN[key] = Known(scores.scale, scores.softcap, prepared)
