"""The dimension of attention that holds the heads; attention over 3 or 5 dimensions as [B, H, M, D], and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Around = tuple[nn.Module, Tensor | None]
"""A module and its input."""

# Names under which attention modules store their number of heads.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
# Packages whose 3-dimensional attention is over [B * H, M, D], with the heads of an item side by side.
_BATCH_BEFORE_HEADS = ("timm.", "transformers.", "torch.", "torchvision.", "open_clip.", "attnx.")
# Class names of modules over [B, windows, H, M, D], and over [B, H, windows, M, D], for equal numbers of both.
_SWIN = ("WindowAttention", "WindowMultiHeadAttention", "Swinv2SelfAttention", "ShiftedWindowAttention",
         "ShiftedWindowAttentionV2")  # fmt: skip
_WINDOWS_FIRST = ("LocallyGroupedAttn", *_SWIN)
_HEADS_FIRST = ("MaskUnitAttention", "HieraMaskUnitAttention", "OutlookAttention")


class Folding(NamedTuple):
    """A change of shape to [B, H, M, D] and back.

    fold: for q, k, v, weights or a mask; windows join the batch: item b * windows + w.
    unfold: for the output.
    """

    fold: Callable[[Tensor], Tensor]
    unfold: Callable[[Tensor], Tensor]


def folding(shape: tuple[int, ...], modules: Sequence[Around]) -> Folding:
    """The folding of q, k, v and of weights with the leading dimensions of `shape`.

    Args:
        shape: of the weights, [..., M, N], with 3 to 5 dimensions.
        modules: the module that attends, with its input, and the module around it. The first that has a number of heads
            gives the heads, and its input the size of the batch.

    Raises:
        NotImplementedError: it is unknown which dimension holds the heads.
    """
    (module, x), heads = _with_heads(modules)
    if len(shape) == 4 and (heads == shape[1] if heads else _is_batch_first(shape, x)):
        return Folding(same, same)
    if len(shape) == 3 and (found := _split_batch(shape, heads, [x for _, x in modules] if heads is None else [x])):
        batch, split = found
        if split == 1:
            return Folding(lambda t: t.unsqueeze(-3), lambda t: t.squeeze(-3))
        if batch == 1 or type(module).__module__.startswith(_BATCH_BEFORE_HEADS):
            return Folding(lambda t: _by_heads(t, batch, split), lambda t: t.flatten(0, 1))
    if len(shape) == 5 and heads in shape[1:3]:
        name = type(module).__name__
        axis = 2 if name in _WINDOWS_FIRST or (heads != shape[1] and name not in _HEADS_FIRST) else 1
        if shape[axis] == heads and (shape[1] != shape[2] or name in _WINDOWS_FIRST + _HEADS_FIRST):
            order = (0, 3 - axis, axis, 3, 4)  # is its own inverse
            sizes = (shape[0], shape[3 - axis])
            return Folding(lambda t: _merge(t, shape[:3], order), lambda t: t.unflatten(0, sizes).permute(order))
    raise unknown_heads(shape, modules)


def unknown_heads(shape: tuple[int, ...], modules: Sequence[Around]) -> NotImplementedError:
    """The error for scores [..., M, N] of which it is unknown which dimension holds the heads."""
    (module, _), heads = _with_heads(modules)
    number = f"; {type(module).__name__} has {heads} head{'s' * (heads > 1)}" if heads else ""
    if heads and len(shape) == 3 and shape[0] % heads == 0:
        return NotImplementedError(
            f"expected [B, H, M, N]; got {list(shape)}{number}, and it is unknown whether its maps go by image or by "
            "head; attend over [B, H, M, D]"
        )
    if heads and len(shape) == 4 and shape[0] == heads:
        return NotImplementedError(f"expected [B, H, M, N]; got {list(shape)}, with the {heads} heads in dimension 0")
    return NotImplementedError(
        f"expected [B, H, M, N], or dimensions whose heads are known by the module's num_heads and its input; got "
        f"{list(shape)}{number}"
    )


def has_other_heads(q: Tensor, modules: Sequence[Around]) -> bool:
    """True if dimension 1 of q, [B, H, M, D], can't be the heads, by the number of heads of the module and its input.

    q has a divisor of this number if each device has some of the heads, and a multiple if each head has several parts.
    """
    heads, x = (_heads_of(modules[0][0]), modules[0][1]) if modules else (None, None)
    if heads is None:
        return False
    first, second = q.shape[:2]
    if first == second == heads:
        # A view of a projection [B, M, H, D] in the order [H, B, M, D].
        return q.stride(0) == q.shape[3] and q.stride(1) > q.stride(2)
    if first == heads and second in _batches(x, (q.shape[2],)) - {first}:
        return True
    return heads % max(1, second) != 0 and (heads == 1 or second % heads != 0)


def same(t: Tensor) -> Tensor:
    """The tensor itself."""
    return t


def _by_heads(t: Tensor, batch: int, heads: int) -> Tensor:
    """[B H, M, D] -> [B, H, M, D]; a mask that is the same for all items keeps its single item."""
    return t if t.dim() < 3 else t.unsqueeze(0) if t.shape[0] == 1 else t.unflatten(0, (batch, heads))


def _merge(t: Tensor, sizes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """5 dimensions in another order, the first two merged; a mask may have dimensions of 1, or fewer.

    A mask that is the same for all images stays that of one image, [windows, H, M, N], as `attnx.attention` repeats it.
    One that differs between the images and not between their windows is copied for each window.
    """
    if t.dim() < 3:
        return t
    whole = t[(None,) * (5 - t.dim())].permute(order)
    if len(whole) > 1:
        whole = whole.expand(-1, sizes[order[1]], -1, -1, -1)
    return whole.flatten(0, 1)


def _with_heads(modules: Sequence[Around]) -> tuple[Around, int | None]:
    """The first module that has a number of heads, and the number; else the first module, and None."""
    return next(((m, heads) for m in modules if (heads := _heads_of(m[0]))), (modules[0], None))


def _heads_of(module: Any) -> int | None:
    found = (getattr(module, name, None) for name in _HEADS)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _split_batch(shape: tuple[int, ...], heads: int | None, inputs: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """(batch, heads) of weights [batch * heads, M, N]; None unless exactly one pair fits every known input."""
    pairs: set[tuple[int, int]] | None = None
    for x in inputs:
        batches = _batches(x, shape[1:])
        fitting = {(b, n) for b in batches for n in (1, heads) if n is not None and b * n == shape[0]}
        if batches:
            pairs = fitting if pairs is None else pairs & fitting
    return pairs.pop() if pairs is not None and len(pairs) == 1 else None


def _is_batch_first(shape: tuple[int, ...], x: Tensor | None) -> bool:
    """True if weights [B, ?, M, N] of a module without a number of heads agree with its input."""
    if x is None or x.dim() not in (3, 4):
        return False
    if x.dim() == 3:
        return shape[0] in _batches(x, (shape[2],))
    # [B, H, M, D], [B, h, w, C] or [B, C, h, w]
    _, a, b, c = x.shape
    return shape[0] == x.shape[0] and ((a, b) == shape[1:3] or shape[2] in (a * b, b * c))


def _batches(x: Tensor | None, tokens: tuple[int, ...]) -> set[int]:
    """Possible sizes of the batch of a module's input: [B, M or N, C], [M or N, B, C] or [B, h, w, C]."""
    if x is None or x.dim() not in (3, 4):
        return set()
    if x.dim() == 4:
        return {x.shape[0]}
    return {x.shape[1 - axis] for axis in (0, 1) if x.shape[axis] in tokens}
