"""Attention of blocks that call no SDPA: the softmax over the keys is the map, once its weights multiply the values.

The block materialises its weights [B, H, M, N] itself; their heads are fused at once. A softmax whose weights multiply
nothing is no attention, such as the sampling weights of deformable attention.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.trace.folding import folding
from attnx.trace.gradient_record import starts_graph
from attnx.trace.layers import is_attention

if TYPE_CHECKING:
    from attnx.trace.hooks import Frame
    from attnx.trace.interceptor import Interceptor

SOFTMAX = frozenset({F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax})
PRODUCTS = frozenset({torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm})


def softmax(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The softmax, whose weights are remembered in the frame of the module that attends."""
    weights = func(*args, **kwargs)
    frame = _attending(interceptor.local.frames)
    if frame.fused or not _over_keys(args, kwargs):
        return weights
    if interceptor.recorder.grad and interceptor.is_wanted(frame.name) and torch.is_grad_enabled():
        weights = starts_graph(weights)
    frame.weights.append(weights)
    return weights


def product(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The matrix product; if it multiplies values by remembered weights, these are recorded first."""
    frame = next((frame for frame in reversed(interceptor.local.frames) if frame.weights), None)
    if frame is not None:
        used, p = _used(frame.weights, (*args, *kwargs.values()), sinks=hasattr(frame.module, "sinks"))
        if p is not None:
            frame.weights = [weights for weights in frame.weights if not any(weights is u for u in used)]
            _record(interceptor, frame, p)
    return func(*args, **kwargs)


def note_unused(interceptor: "Interceptor", frame: "Frame") -> None:
    """Store the reason that a module, which has run, has no map although it computed a softmax."""
    if frame.weights and not frame.fused and is_attention(frame.module) and frame.name not in interceptor.intercepted:
        reason = "its softmax is no attention: its weights multiply no matrix of values"
        interceptor.skipped.setdefault(frame.name, reason)


def _record(interceptor: "Interceptor", frame: "Frame", weights: Tensor) -> None:
    """Record the weights [..., M, N] that a block computed itself, if its layer is requested."""
    name, kind = frame.name, type(frame.module).__name__
    if interceptor.torn is not None or not interceptor.is_wanted(name):
        interceptor.note_layer(name)
        return
    try:
        if interceptor.wanted is None and not is_attention(frame.module):
            raise NotImplementedError(
                f"its softmax multiplies values, but the name of its class, {kind}, does not say that it attends; if "
                f"it does, pass layers=[{name!r}]"
            )
        fold = folding(weights.shape, frame.module, frame.main_input()).fold
    except NotImplementedError as error:
        interceptor.skip(name, str(error))
        return
    interceptor.note_layer(name)
    interceptor.explicit.add(name)
    p = fold(weights.detach())
    facts = interceptor.facts(frame, (len(p), *p.shape[2:]))
    interceptor.recorder.answer_weights(interceptor.key(name), p, weights, fold, facts)


def _attending(frames: Sequence["Frame"]) -> "Frame":
    """The frame of the module that a softmax belongs to: the innermost, or the one around it if only that attends."""
    inner = frames[-1]
    if isinstance(inner.module, nn.Softmax) and len(frames) > 1:
        frames = frames[:-1]
        inner = frames[-1]
    if not is_attention(inner.module) and len(frames) > 1 and is_attention(frames[-2].module):
        return frames[-2]
    return inner


def _over_keys(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for arguments of a softmax over the last of at least 3 dimensions."""
    x = args[0] if args else kwargs.get("input")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return isinstance(x, Tensor) and x.dim() >= 3 and dim in (-1, x.dim() - 1)


def _used(pending: Sequence[Tensor], values: Sequence[Any], sinks: bool) -> tuple[list[Tensor], Tensor | None]:
    """The weights that a product with these operands uses, and the weights that are recorded; None if it uses none.

    An operand is a view of the weights, or has their shape: after dropout, a change of dtype, or a mixing of heads. An
    operand without the columns of attention sinks, or one that can come from several softmaxes and so combines them, is
    recorded itself.

    Args:
        pending: weights that have not been used yet.
        values: arguments of the product.
        sinks: True if the module has attention sinks: the last column of the weights, which has no value.
    """
    operands = list(_tensors(values))
    for operand in operands:
        for weights in pending:
            if _is_view(operand, weights):
                if operand.numel() == weights.numel():
                    return [weights], weights
                if operand.shape[:-1] == weights.shape[:-1]:
                    return [weights], operand
    for operand in operands:
        alike = [w for w in pending if w.shape[-2:] == operand.shape[-2:] and w.numel() == operand.numel()]
        if alike:
            return alike, alike[0] if len(alike) == 1 else operand
        cut = [w for w in pending if sinks and operand.shape == (*w.shape[:-1], w.shape[-1] - 1)]
        if cut:
            return cut[:1], operand
    return [], None


def _is_view(operand: Tensor, weights: Tensor) -> bool:
    """True if both start at the same place of memory; False for tensors without memory of their own."""
    try:
        return operand.data_ptr() == weights.data_ptr() != 0
    except RuntimeError:
        return False


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and value.dim() >= 2:
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
