"""Attention over 3 or 5 dimensions as [B, H, M, D]: which dimension holds the heads, and the way back."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

# Names under which attention modules store their number of heads.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
# Class names of modules over [B, windows, H, M, D]; others have the heads before the windows, or sizes that tell.
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


def folding(shape: tuple[int, ...], module: nn.Module, x: Tensor | None) -> Folding:
    """The folding of q, k, v and of weights with the leading dimensions of `shape`.

    Args:
        shape: of the weights, [..., M, N], with 3 to 5 dimensions.
        module: the module that attends; it tells its number of heads.
        x: its input, which tells the size of the batch.

    Raises:
        NotImplementedError: the shape does not tell which dimension holds the heads.
    """
    heads = _heads_of(module)
    if len(shape) == 4 and heads in (None, shape[1]):
        return Folding(same, same)
    if len(shape) == 3:
        # Sizes of the batch, each with one head or with the module's heads.
        fitting = {(b, n) for b in _batches(x, shape[1:]) for n in (1, heads) if n is not None and b * n == shape[0]}
        if len(fitting) == 1:
            batch, split = fitting.pop()
            if split == 1:
                return Folding(lambda t: t.unsqueeze(-3), lambda t: t.squeeze(-3))
            return Folding(lambda t: _split(t, batch, split), lambda t: t.flatten(0, 1))
    if len(shape) == 5 and heads in shape[1:3]:
        name = type(module).__name__
        axis = 2 if name in _WINDOWS_FIRST or (heads != shape[1] and name not in _HEADS_FIRST) else 1
        if shape[axis] == heads and (shape[1] != shape[2] or name in _WINDOWS_FIRST + _HEADS_FIRST):
            order = (0, 3 - axis, axis, 3, 4)  # is its own inverse
            sizes = (shape[0], shape[3 - axis])
            return Folding(lambda t: _merge(t, shape[:3], order), lambda t: t.unflatten(0, sizes).permute(order))
    said = f"; {type(module).__name__} has {heads} heads" if heads is not None else ""
    raise NotImplementedError(f"expected [B, H, M, D], or a shape that tells its heads; got {list(shape)}{said}")


def same(t: Tensor) -> Tensor:
    """The tensor itself."""
    return t


def _split(t: Tensor, batch: int, heads: int) -> Tensor:
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


def _heads_of(module: Any) -> int | None:
    found = (getattr(module, name, None) for name in _HEADS)
    return next((n for n in found if isinstance(n, int)), None)


def _batches(x: Tensor | None, tokens: tuple[int, ...]) -> set[int]:
    """Possible sizes of the batch of a module's input: [B, M or N, C], [M or N, B, C] or [B, h, w, C]."""
    if x is None or x.dim() not in (3, 4):
        return set()
    if x.dim() == 4:
        return {x.shape[0]}
    return {x.shape[1 - axis] for axis in (0, 1) if x.shape[axis] in tokens}
