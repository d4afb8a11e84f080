"""Attention of blocks that call no SDPA: softmax(Q K^T) V, computed by the block's own code.

The result of a softmax is the map of a block if its scores have the shape of a product of matrices that the block
computed before, and if it multiplies values in a product after. The block materialises its weights [B, H, M, N] itself;
their heads are fused at once.
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
PRODUCTS = frozenset({
    torch.matmul, torch.bmm, torch.einsum, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm,
})  # fmt: skip
# Functions whose result stands for their argument: dropout, other dtypes, copies.
COPIES = frozenset({
    F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.type, Tensor.float, Tensor.double, Tensor.half,
    Tensor.bfloat16, Tensor.contiguous,
})  # fmt: skip
# Classes that mix the heads of the weights ("talking heads"); their map is the softmax before that.
_MIXES_HEADS = ("TalkingHeadAttn", "Attention2d", "Attention2dDownsample")
# Classes whose scores are no product of queries and keys.
_NO_PRODUCT = ("OutlookAttention",)
_NO_ATTENTION = (
    "its softmax is no attention: its scores are no product of queries and keys, or its weights multiply no matrix of "
    "values"
)


class Weights:
    """The result of a softmax over the keys, and the copies of it that the block makes."""

    __slots__ = ("forms", "p")

    def __init__(self, p: Tensor) -> None:
        self.p = p
        self.forms = [p]

    def has(self, t: Tensor) -> bool:
        """True if a tensor is a view of the weights or of a copy, possibly without the last columns."""
        return any(_is_view(t, form) for form in self.forms)


def softmax(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The softmax, whose result is stored in the frame of the module that attends if it may be the weights."""
    weights = func(*args, **kwargs)
    frame = _attending(interceptor.local.frames)
    if not _over_keys(args, kwargs):
        return weights
    if not frame.has_scores(weights.shape) and type(frame.module).__name__ not in _NO_PRODUCT:
        frame.other_softmax = True
        return weights
    if interceptor.recorder.grad and interceptor.is_wanted(frame.name) and torch.is_grad_enabled():
        started = starts_graph(weights)
        # A copy, since the block may write to the weights, and autograd refuses that for the start of a graph.
        weights = weights if started is weights else started.clone()
    frame.weights.append(Weights(weights))
    return weights


def copied(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of one of COPIES; a copy of stored weights is stored with them."""
    result = func(*args, **kwargs)
    frame = _with_weights(interceptor.local.frames)
    if frame is not None and args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
        for weights in frame.weights:
            if weights.has(args[0]):
                weights.forms.append(result)
    return result


def product(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The product of matrices; if it multiplies values by stored weights, these are recorded first."""
    frames = interceptor.local.frames
    frame = _with_weights(frames)
    if frame is not None:
        mixes = type(frame.module).__name__ in _MIXES_HEADS
        used, p = _used(frame.weights, (*args, *kwargs.values()), mixes)
        if p is not None:
            frame.weights = [weights for weights in frame.weights if weights not in used]
            _record(interceptor, frame, p)
    result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        _attending(frames).products.add(result.shape)
    return result


def note_unused(interceptor: "Interceptor", frame: "Frame") -> None:
    """Store the reason that a module, which has run, has no map although it computed a softmax."""
    computed = frame.other_softmax or frame.weights
    if computed and not frame.fused and is_attention(frame.module) and frame.name not in interceptor.intercepted:
        interceptor.skipped.setdefault(frame.name, _NO_ATTENTION)


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
        if interceptor.recorder.grad and torch.is_grad_enabled() and not weights.requires_grad:
            raise NotImplementedError("the weights that multiply its values do not depend on its softmax")
        fold = folding(weights.shape, interceptor.local.around(frame)).fold
    except NotImplementedError as error:
        interceptor.skip(name, str(error))
        return
    interceptor.note_layer(name)
    interceptor.explicit.add(name)
    p = fold(weights.detach())
    facts = interceptor.facts(frame, (len(p), *p.shape[2:]))
    interceptor.recorder.answer_weights(interceptor.key(name), p, weights, fold, facts)


def _attending(frames: Sequence["Frame"]) -> "Frame":
    """The frame of the module that attends: the innermost, or the one around it if only that has such a name."""
    inner = frames[-1]
    if isinstance(inner.module, nn.Softmax) and len(frames) > 1:
        frames = frames[:-1]
        inner = frames[-1]
    if not is_attention(inner.module) and len(frames) > 1 and is_attention(frames[-2].module):
        return frames[-2]
    return inner


def _with_weights(frames: Sequence["Frame"]) -> "Frame | None":
    """The innermost frame with stored weights."""
    return next((frame for frame in reversed(frames) if frame.weights), None)


def _over_keys(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for arguments of a softmax over the last of at least 3 dimensions."""
    x = args[0] if args else kwargs.get("input")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return isinstance(x, Tensor) and x.dim() >= 3 and dim in (-1, x.dim() - 1)


def _used(pending: Sequence[Weights], values: Sequence[Any], mixes: bool) -> tuple[list[Weights], Tensor | None]:
    """The weights that a product with these operands uses, and the tensor that is recorded; None if it uses none.

    An operand is a view of the weights or of a copy, or has their shape. In the second case the block has changed them,
    or has combined those of several softmaxes, and the operand itself is recorded. An operand without the last columns
    leaves out attention sinks, and is recorded too.

    Args:
        pending: weights that have not been used yet.
        values: arguments of the product.
        mixes: True if the block mixes the heads of the weights, which are then recorded.
    """
    operands = list(_tensors(values))
    for operand in operands:
        for weights in pending:
            if weights.has(operand):
                whole = operand.numel() == weights.p.numel()
                if whole or operand.shape[:-1] == weights.p.shape[:-1]:
                    return [weights], weights.p if whole else operand
    for operand in operands:
        alike = [w for w in pending if w.p.shape[-2:] == operand.shape[-2:] and w.p.numel() == operand.numel()]
        if alike:
            return alike, alike[0].p if mixes and len(alike) == 1 else operand
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
