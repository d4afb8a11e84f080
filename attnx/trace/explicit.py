"""Attention of blocks that call no SDPA: softmax(Q K^T) V, computed by the block's own code.

The result of a softmax is the map of a block if its scores have the shape of a product of matrices that the block
computed before, and if it multiplies values in a product after. What the block makes of the weights until then is
followed from call to call. The block materialises its weights [B, H, M, N] itself; their heads are fused at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnx.trace.folding import folding
from attnx.trace.gradient_record import starts_graph
from attnx.trace.layers import is_attention
from attnx.trace.own_weights import Form, Weights

if TYPE_CHECKING:
    from attnx.trace.hooks import Frame
    from attnx.trace.interceptor import Interceptor

SOFTMAX = frozenset({F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax})
PRODUCTS = frozenset({
    torch.matmul, torch.bmm, torch.einsum, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm,
})  # fmt: skip
# Classes that mix the heads of the weights ("talking heads"); their map is the softmax before that.
_MIXES_HEADS = ("TalkingHeadAttn", "Attention2d", "Attention2dDownsample")
# Classes whose scores are no product of queries and keys.
_NO_PRODUCT = ("OutlookAttention",)
_NO_ATTENTION = (
    "its softmax is no attention: it is not over the last dimension, its scores are no product of queries and keys, or "
    "its weights multiply no matrix of values"
)


def softmax(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The softmax, whose result is stored in the frame of the module that attends if it may be the weights."""
    weights = func(*args, **kwargs)
    frame = _attending(interceptor.local.frames)
    if not _over_keys(args, kwargs):
        frame.other_softmax |= weights.dim() >= 3
        return weights
    if not frame.has_scores(weights.shape) and type(frame.module).__name__ not in _NO_PRODUCT:
        frame.other_softmax = True
        return weights
    if interceptor.recorder.grad and interceptor.is_wanted(frame.name) and torch.is_grad_enabled():
        started = starts_graph(weights)
        # A copy, since the block may write to the weights, and autograd refuses that for the start of a graph.
        weights = weights if started is weights else started.clone()
    frame.weights.append(Weights(weights))
    interceptor.local.note_weights()
    return weights


def followed(
    interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of a function; what it made of stored weights is stored with them."""
    result = func(*args, **kwargs)
    frame = _with_weights(interceptor.local.frames)
    if frame is not None:
        operands, results = list(_tensors((*args, *kwargs.values()))), list(_tensors([result]))
        for weights in frame.weights:
            weights.add_forms(func, operands, results)
    return result


def product(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The product of matrices; if it multiplies values by stored weights, these are recorded first."""
    frames = interceptor.local.frames
    frame = _with_weights(frames)
    if frame is not None:
        factors = _factors(func, args, kwargs)
        if factors and all(any(weights.form(factor.tensor) for weights in frame.weights) for factor in factors):
            return followed(interceptor, func, args, kwargs)  # weights times weights
        used = _used(frame.weights, factors)
        if used:
            frame.weights = [weights for weights in frame.weights if weights not in used]
            interceptor.local.note_weights()
            mixed = len(used) == 1 and type(frame.module).__name__ in _MIXES_HEADS
            weights, form = next(iter(used.items()))
            _record(interceptor, frame, Form(ref(weights.p)) if mixed else form)
    result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        _attending(frames).products.add(result.shape)
    return result


def note_unused(interceptor: "Interceptor", frame: "Frame") -> None:
    """Store the reason that a module, which has run and computed a softmax, has no map."""
    if not frame.fused and is_attention(frame.module) and frame.name not in interceptor.intercepted:
        interceptor.skipped.setdefault(frame.name, _NO_ATTENTION)


def _record(interceptor: "Interceptor", frame: "Frame", form: Form) -> None:
    """Record the weights that a block computed itself, if its layer is requested."""
    name, kind, weights = frame.name, type(frame.module).__name__, form.tensor()
    assert weights is not None
    if interceptor.torn is not None or not interceptor.is_wanted(name):
        interceptor.note_layer(name)
        return
    try:
        if isinstance(frame.module, fx.GraphModule):
            raise NotImplementedError("a graph computes its softmax: capture the model that the graph was made from")
        if interceptor.wanted is None and not is_attention(frame.module):
            raise NotImplementedError(
                f"its softmax multiplies values, but the name of its class, {kind}, does not say that it attends; if "
                f"it does, pass layers=[{name!r}]"
            )
        if interceptor.recorder.grad and torch.is_grad_enabled() and not weights.requires_grad:
            raise NotImplementedError("the weights that multiply its values do not depend on its softmax")
        folds = folding(form.straight(weights).shape, interceptor.local.around(frame)).fold
    except NotImplementedError as error:
        interceptor.skip(name, str(error))
        return
    interceptor.note_layer(name)
    interceptor.explicit.add(name)

    def fold(t: Tensor) -> Tensor:
        return folds(form.straight(t))

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


class _Factor(NamedTuple):
    """An operand of a product, and for each of its dimensions True if the product sums over it."""

    tensor: Tensor
    sums: tuple[bool, ...]


def _factors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Factor]:
    """The operands of one of PRODUCTS with at least 2 dimensions."""
    if func is torch.einsum:
        found = _einsum(*args)
    else:
        values = (*args, *(value for name, value in kwargs.items() if name != "out"))
        *_, left, right = (None, None, *(value for value in values if isinstance(value, Tensor)))
        if left is None or right is None:
            return []
        found = [
            _Factor(left, (False,) * (left.dim() - 1) + (True,)),
            _Factor(right, (False,) * (right.dim() - 2) + (True, False)),
        ]
    return [factor for factor in found if factor.tensor.dim() >= 2]


def _einsum(first: Any, *others: Any) -> list[_Factor]:
    """The operands of `torch.einsum` with these arguments; [] for lists in place of an equation."""
    if not isinstance(first, str):
        return []
    operands = others[0] if len(others) == 1 and isinstance(others[0], tuple | list) else others
    terms, arrow, out = first.replace(" ", "").partition("->")
    if not arrow:  # indices that occur once are those of the result
        out = "".join(index for index in terms if terms.count(index) == 1)
    found = []
    for t, term in zip(operands, terms.split(","), strict=False):
        before, _, after = term.partition("...")
        hidden = t.dim() - len(before) - len(after)
        sums = [[index not in out for index in part] for part in (before, after)]
        found.append(_Factor(t, (*sums[0], *(False,) * hidden, *sums[1])))
    return found


def _used(pending: Sequence[Weights], factors: Sequence[_Factor]) -> dict[Weights, Form]:
    """The weights that a product sums over their keys, and their forms; {} if there are none. The first is recorded.

    If an operand is the weights, these are recorded. If the block has changed them, or combined those of several
    softmaxes, the operand is recorded. An operand without a column of attention sinks is recorded, too.
    """
    for operand, sums in factors:
        forms = {weights: form for weights in pending if (form := weights.form(operand)) is not None}
        for weights, form in forms.items():
            queries, keys = form.axes
            if sums[queries] or not sums[keys] or not weights.has_size(form.straight(operand)):
                continue
            if not form.unchanged:
                return {weights: form, **forms}
            return {weights: Form(ref(weights.p)) if operand.numel() == weights.p.numel() else form}
    return {}


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of at least 2 dimensions among values, tuples and lists."""
    for value in values:
        if isinstance(value, Tensor) and value.dim() >= 2:
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
