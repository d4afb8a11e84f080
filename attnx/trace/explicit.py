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
    Tensor.bfloat16, Tensor.contiguous, Tensor.clone, torch.clone,
})  # fmt: skip
# Classes that mix the heads of the weights ("talking heads"); their map is the softmax before that.
_MIXES_HEADS = ("TalkingHeadAttn", "Attention2d", "Attention2dDownsample")
# Classes whose scores are no product of queries and keys.
_NO_PRODUCT = ("OutlookAttention",)
_NO_ATTENTION = (
    "its softmax is no attention: it is not over the last dimension, its scores are no product of queries and keys, or "
    "its weights multiply no matrix of values"
)


class Form(NamedTuple):
    """A tensor that a block made of its weights.

    Attributes:
        tensor: the tensor.
        same: True for the weights themselves, or some of them; False if the block changed them.
        flipped: True if its last two dimensions are keys and queries, False if queries and keys.
    """

    tensor: ref[Tensor]
    same: bool
    flipped: bool


class Weights:
    """The result of a softmax over the keys, and what the block makes of it."""

    __slots__ = ("forms", "p")

    def __init__(self, p: Tensor) -> None:
        self.p = p
        self.forms = [Form(ref(p), True, False)]

    def form(self, t: Tensor) -> Form | None:
        """The form that a tensor is; None if it was not made of the weights."""
        return next((form for form in self.forms if form.tensor() is t), None)

    def follow(self, func: Callable[..., Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Add the results of a function as forms if one of its operands is a form."""
        written = operands[:1] if func is Tensor.__setitem__ else [] if func in COPIES else results
        for t in written:
            if any(t is operand for operand in operands) and self.form(t) is not None:
                self._change(t)
        source = next((form for t in operands if (form := self.form(t))), None)
        before = None if source is None else source.tensor()
        if source is None or before is None:
            return
        for result in results:
            if self.form(result) is None:
                view = _is_view(result, before)
                same = source.same and (view or func in COPIES)
                self.forms.append(Form(ref(result), same, source.flipped ^ (view and _is_transposed(result, before))))

    def _change(self, written: Tensor) -> None:
        """Mark the forms that differ from the weights after a tensor was written to: its views, or all copies."""
        memory, own = _memory(written), _memory(self.p)
        for i, form in enumerate(self.forms):
            here = _memory(form.tensor())
            if (here != own) if memory == own else (here == memory):
                self.forms[i] = form._replace(same=False)


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
            weights.follow(func, operands, results)
    return result


def product(interceptor: "Interceptor", func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The product of matrices; if it multiplies values by stored weights, these are recorded first."""
    frames = interceptor.local.frames
    frame = _with_weights(frames)
    if frame is not None:
        operands = list(_tensors((*args, *kwargs.values())))
        if all(any(weights.form(t) for weights in frame.weights) for t in operands):
            return followed(interceptor, func, args, kwargs)  # weights times weights
        mixes = type(frame.module).__name__ in _MIXES_HEADS
        used, p = _used(frame.weights, _factors(func, args, kwargs), mixes)
        if p is not None:
            frame.weights = [weights for weights in frame.weights if weights not in used]
            interceptor.local.note_weights()
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
        if isinstance(frame.module, fx.GraphModule):
            raise NotImplementedError("a graph computes its softmax: capture the model that the graph was made from")
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


class _Factor(NamedTuple):
    """An operand of a product of matrices; `flipped`: the product sums over its second to last dimension."""

    tensor: Tensor
    flipped: bool


def _factors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Factor]:
    """The operands of one of PRODUCTS; of an einsum, those whose last dimension or the one before is summed over."""
    values = (*args, *kwargs.values())
    operands = list(_tensors(values))
    if func is not torch.einsum:
        return [_Factor(t, place == 1) for place, t in enumerate(operands[-2:])]
    equation = next((value for value in values if isinstance(value, str)), "").replace(" ", "")
    terms, arrow, out = equation.partition("->")
    if not arrow:  # indices that occur once are those of the result
        out = "".join(index for index in terms if terms.count(index) == 1)
    found = []
    for t, term in zip(operands, terms.split(","), strict=False):
        summed = [index not in out for index in term[-2:]]
        if len(summed) == 2 and summed[0] != summed[1]:
            found.append(_Factor(t, summed[0]))
    return found


def _used(pending: Sequence[Weights], factors: Sequence[_Factor], mixes: bool) -> tuple[list[Weights], Tensor | None]:
    """The weights that a product uses, and the tensor that is recorded, [..., M, N]; None if it uses none.

    The product must sum over the keys. If an operand is the weights, these are recorded. If the block has changed them,
    or combined those of several softmaxes, the operand itself is recorded. An operand without a column of attention
    sinks is recorded, too.

    Args:
        pending: weights that have not been used yet.
        factors: operands of the product.
        mixes: True if the block mixes the heads of the weights; the weights before that are recorded.
    """
    for operand, flipped in factors:
        forms = {weights: form for weights in pending if (form := weights.form(operand)) is not None}
        for weights, form in forms.items():
            (M, N), straight = weights.p.shape[-2:], operand.mT if form.flipped else operand
            whole = straight.shape[-2:] == (M, N) and operand.numel() == weights.p.numel()
            if form.flipped != flipped or not (whole or straight.shape == (*weights.p.shape[:-1], N - 1)):
                continue
            if form.same:
                return [weights], weights.p if whole else straight
            return list(forms), weights.p if mixes and len(forms) == 1 else straight
    return [], None


def _memory(t: Tensor | None) -> int:
    """Address of the memory that a tensor shares with its views; 0 if it has none."""
    try:
        return 0 if t is None else t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _is_view(result: Tensor, source: Tensor) -> bool:
    """True if both start at the same place of memory; False for tensors without memory of their own."""
    try:
        return result.data_ptr() == source.data_ptr() != 0
    except RuntimeError:
        return False


def _is_transposed(result: Tensor, source: Tensor) -> bool:
    """True if a view has the last two dimensions of its source in the other order, and the others as they were."""
    (*sizes, m, n), (*strides, a, b) = source.shape, source.stride()
    return (*result.shape, *result.stride()) == (*sizes, n, m, *strides, b, a)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of at least 2 dimensions among values, tuples and lists."""
    for value in values:
        if isinstance(value, Tensor) and value.dim() >= 2:
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
