"""Windows of windowed attention: which tokens of the grid attend to one another, read from the block that runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]

_MERGES = {
    "PatchMerging",
    "PatchMergingV2",
    "SwinPatchMerging",
    "Swinv2PatchMerging",
    "DonutSwinPatchMerging",
    "MaskFormerSwinPatchMerging",
}


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a block. A batch of B images becomes B * nW attention maps of K x K tokens, image by image.

    Args:
        index: [nW, K] int64 on the CPU: position in the grid of each token of each window, row by row; -1 for padding.
            Each position of the grid occurs once.
        grid: (rows, columns) of tokens.

    Raises:
        ValueError: a position of the grid occurs in no window or in several.
    """

    index: Tensor
    grid: Pair

    def __post_init__(self) -> None:
        found = self.index[self.index >= 0].sort().values
        if not torch.equal(found, torch.arange(self.tokens, device=found.device)):
            raise ValueError(
                f"index: expected each of the {self.tokens} positions of the grid once; got {len(found)} positions, "
                f"{len(found.unique())} of them different"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        """Number of windows, nW."""
        return self.index.shape[0]

    @property
    def size(self) -> int:
        """Number of tokens of a window, K, padding included."""
        return self.index.shape[1]

    @property
    def padded(self) -> bool:
        """True if some tokens of the windows are padding."""
        return self.count * self.size > self.tokens

    def fits(self, shape: Sequence[int]) -> bool:
        """True if maps of this shape, [items, M, N], are those of the windows of whole images."""
        return shape[0] % self.count == 0 and tuple(shape[1:]) == (self.size, self.size)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The index with N = `tokens` in place of -1, [nW, K], and the place w * K + i of each position, [N].

        Both are copied to a device once.
        """
        return _places(self.index, self.tokens, device)


@lru_cache(maxsize=256)
def _places(index: Tensor, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Autograd can't save tensors that were made under inference_mode.
    with torch.inference_mode(False):
        at = torch.where(index < 0, tokens, index)
        return at.to(device), at.flatten().argsort()[:tokens].to(device)


@lru_cache(maxsize=256)
def window_index(grid: Pair, window: Pair, shift: Pair, roll_first: bool) -> Tensor:
    """The index of shifted windows, as in `Windows`: [nW, K] int64 on the CPU. Do not modify it: it is cached.

    The grid is padded below and on the right to whole windows, and rolled up and left by `shift`.

    Args:
        grid: (rows, columns) of tokens.
        window: (rows, columns) of a window.
        shift: (rows, columns) to roll by.
        roll_first: True: the grid is rolled, then padded; False: padded, then rolled.

    Reference:
        Liu et al., "Swin Transformer", https://arxiv.org/abs/2103.14030

    Example:
        >>> from attnx.trace.windows import window_index
        >>> window_index((2, 3), (2, 2), (0, 1), False)
        tensor([[ 1,  2,  4,  5],
                [-1,  0, -1,  3]])
    """
    (h, w), (wh, ww) = grid, window
    with torch.inference_mode(False):
        at = torch.arange(h * w, device="cpu").view(h, w)
        back = (-shift[0], -shift[1])
        at = at.roll(back, (0, 1)) if roll_first else at
        at = F.pad(at, (0, -w % ww, 0, -h % wh), value=-1)
        at = at if roll_first else at.roll(back, (0, 1))
        H, W = at.shape
        return at.view(H // wh, wh, W // ww, ww).transpose(1, 2).reshape(-1, wh * ww)


@lru_cache(maxsize=256)
def grid_index(grid: Pair, size: Pair) -> Tensor:
    """The index of grid attention, as in `Windows`: each window holds size[0] x size[1] tokens spread over the grid.

    Do not modify it: it is cached.

    Raises:
        ValueError: the grid is no multiple of the size.

    Reference:
        Tu et al., "MaxViT", https://arxiv.org/abs/2204.01697

    Example:
        >>> from attnx.trace.windows import grid_index
        >>> grid_index((2, 4), (2, 2))
        tensor([[0, 2, 4, 6],
                [1, 3, 5, 7]])
    """
    (h, w), (rows, columns) = grid, size
    if h % rows or w % columns:
        raise ValueError(f"size: expected a divisor of the grid {grid}; got {size}")
    with torch.inference_mode(False):
        at = torch.arange(h * w, device="cpu").view(rows, h // rows, columns, w // columns)
        return at.permute(1, 3, 0, 2).reshape(-1, rows * columns)


def windows_of(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Windows | None:
    """The windows of a block, while the attention inside the block runs; None for modules of other classes.

    Call it then and not before: blocks of transformers set `window_size` and `shift_size` in their forward.

    Args:
        module: the block, or the attention itself in torchvision and Twins.
        args, kwargs: arguments of the block's call.
    """
    read = _READERS.get(type(module).__name__)
    values = args[:1] or tuple(v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())
    if read is None or not values or not isinstance(values[0], Tensor):
        return None
    size = args[1] if len(args) > 1 else kwargs.get("input_dimensions", kwargs.get("size"))
    return read(module, values[0], size)


def merges(module: nn.Module) -> bool:
    """True for patch merging that concatenates 2 x 2 tokens, as in Swin."""
    if type(module).__name__ not in _MERGES:
        return False
    # Other models give this name to convolutions.
    reduction = getattr(module, "reduction", None)
    return isinstance(reduction, nn.Linear) and reduction.in_features % 4 == 0


def _pair(value: Any) -> Pair:
    """(rows, columns) from a pair, or from one number for both."""
    rows, columns = value if isinstance(value, list | tuple | torch.Size) else (value, value)
    return int(rows), int(columns)


def _windows(grid: Any, window: Any, shift: Any = 0, roll_first: bool = False) -> Windows:
    return _cached(_pair(grid), _pair(window), _pair(shift), roll_first)


@lru_cache(maxsize=256)
def _cached(grid: Pair, window: Pair, shift: Pair, roll_first: bool) -> Windows:
    return Windows(window_index(grid, window, shift, roll_first), grid)


def _swin(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of timm [B, H, W, C], torchvision (the same), microsoft [B, H * W, C], and LAVT (the same, and padded)."""
    if type(getattr(module, "attn", None)).__name__ in ("ShiftedWindowAttention", "ShiftedWindowAttentionV2"):
        return _torchvision(module.attn, x, size)
    if not hasattr(module, "window_size") or not hasattr(module, "shift_size"):
        return None
    if x.dim() == 4:
        return _windows(x.shape[1:3], module.window_size, module.shift_size, roll_first=True)
    # LAVT's layers set H and W for each input; microsoft's blocks have one resolution.
    grid = (module.H, module.W) if getattr(module, "H", None) else getattr(module, "input_resolution", None)
    if x.dim() != 3 or grid is None or x.shape[1] != grid[0] * grid[1]:
        return None
    return _windows(grid, module.window_size, module.shift_size)


def _torchvision(module: Any, x: Tensor, size: Any) -> Windows | None:
    """ShiftedWindowAttention [B, H, W, C]. An axis of one window is not shifted."""
    if x.dim() != 4:
        return None
    grid, window, shift = _pair(x.shape[1:3]), _pair(module.window_size), _pair(module.shift_size)
    rows, columns = (0 if n <= of else by for n, of, by in zip(grid, window, shift, strict=True))
    return _windows(grid, window, (rows, columns))


def _transformers(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Swin layers of transformers: [B, H * W, C], and (H, W) as second argument."""
    return None if size is None else _windows(size, module.window_size, module.shift_size)


def _maxvit(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Window or grid attention of MaxViT: [B, H, W, C], or [B, C, H, W] for PartitionAttention2d."""
    if x.dim() != 4:
        return None
    grid = _pair(x.shape[2:] if type(module).__name__ == "PartitionAttention2d" else x.shape[1:3])
    if module.partition_block:
        return _windows(grid, module.partition_size)
    return Windows(grid_index(grid, _pair(module.partition_size)), grid)


def _davit(module: Any, x: Tensor, size: Any) -> Windows | None:
    """SpatialBlock [B, C, H, W]."""
    return _windows(x.shape[2:], module.window_size) if x.dim() == 4 else None


def _sam(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of SAM's image encoder, [B, H, W, C]; window_size 0: one map of the whole grid."""
    window = getattr(module, "window_size", 0)
    return _windows(x.shape[1:3], window) if x.dim() == 4 and isinstance(window, int) and window > 0 else None


def _twins(module: Any, x: Tensor, size: Any) -> Windows | None:
    """LocallyGroupedAttn: [B, H * W, C], and (H, W) as second argument."""
    return None if size is None else _windows(size, module.ws)


def _attnx_swin(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of `attnx.models.lavt_swin`: [B, H * W, C], and (H, W) as second argument."""
    if size is None or not hasattr(module, "window") or not hasattr(module, "shift"):
        return None
    return _windows(size, module.window, module.shift)


_READERS: dict[str, Callable[[Any, Tensor, Any], Windows | None]] = {
    "SwinBlock": _attnx_swin,
    "SwinTransformerBlock": _swin,
    "SwinTransformerBlockV2": _swin,
    "SwinTransformerV2Block": _swin,
    "SwinTransformerV2CrBlock": _swin,
    "ShiftedWindowAttention": _torchvision,
    "ShiftedWindowAttentionV2": _torchvision,
    "SwinLayer": _transformers,
    "Swinv2Layer": _transformers,
    "DonutSwinLayer": _transformers,
    "MaskFormerSwinLayer": _transformers,
    "PartitionAttentionCl": _maxvit,
    "PartitionAttention2d": _maxvit,
    "SpatialBlock": _davit,
    "Block": _sam,
    "SamVisionLayer": _sam,
    "LocallyGroupedAttn": _twins,
}
