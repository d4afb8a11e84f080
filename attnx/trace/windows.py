"""Windows of windowed attention: which tokens of the grid attend to one another, read from the block that runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.trace.facts import parameters

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


def windows_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Windows | None:
    """The windows of a block, while the attention inside the block runs; None for other modules.

    Call it then and not before: blocks of transformers set `window_size` and `shift_size` in their forward. Blocks are
    recognised by class and package. Copies of microsoft's code are recognised by the names that their forward uses.

    Args:
        module: the block, or the attention itself in torchvision and Twins.
        args, kwargs: arguments of the block's call.
    """
    kind: Any = type(module)
    readers = _READERS.get(kind.__name__)
    if readers is None:
        return None
    source = kind.__module__ + "."
    read = next((read for package, read in readers.items() if package and source.startswith(package)), readers.get(""))
    given = dict(zip(parameters(kind), args, strict=False)) | dict(kwargs)
    x = given.get(next(iter(parameters(kind)), ""))
    if read is None or not isinstance(x, Tensor):
        return None
    try:
        return read(module, x, next((given[name] for name in _SIZES if name in given), None))
    except (AttributeError, TypeError, ValueError):
        return None  # another class of this name


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


@lru_cache(maxsize=256)
def _spread(grid: Pair, size: Pair) -> Windows:
    return Windows(grid_index(grid, size), grid)


def _timm_swin(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of timm's Swin: [B, H, W, C]."""
    return _windows(x.shape[1:3], module.window_size, module.shift_size, roll_first=True) if x.dim() == 4 else None


def _torchvision_block(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of torchvision's Swin: [B, H, W, C]."""
    return _torchvision(module.attn, x, size)


def _microsoft(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of microsoft's code and its copies, such as LAVT's: [B, H * W, C].

    The code for classification has one resolution and no padding. In that for detection the layer sets H and W for each
    input, and the block pads and then rolls.
    """
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    if not {"roll", "window_partition", "window_reverse", "window_size", "shift_size"} <= set(names):
        return None
    if "pad" in names:
        grid = (module.H, module.W) if names.index("pad") < names.index("roll") else None
    else:
        grid = module.input_resolution
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
    return _spread(grid, _pair(module.partition_size))


def _davit(module: Any, x: Tensor, size: Any) -> Windows | None:
    """SpatialBlock [B, C, H, W]."""
    return _windows(x.shape[2:], module.window_size) if x.dim() == 4 else None


def _sam(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of SAM's image encoder, [B, H, W, C]; window_size 0: no windows."""
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


_SIZES = ("input_dimensions", "size", "grid")  # names of the arguments that hold (H, W)
_Reader = Callable[[Any, Tensor, Any], Windows | None]
_TRANSFORMERS: dict[str, _Reader] = {"transformers.": _transformers}
# {class: {start of its module's name: reader}}; "": any module.
_READERS: dict[str, dict[str, _Reader]] = {
    "SwinBlock": {"attnx.": _attnx_swin},
    "SwinTransformerBlock": {"timm.": _timm_swin, "torchvision.": _torchvision_block, "": _microsoft},
    "SwinTransformerBlockV2": {"torchvision.": _torchvision_block},
    "SwinTransformerV2Block": {"timm.": _timm_swin},
    "SwinTransformerV2CrBlock": {"timm.": _timm_swin},
    "ShiftedWindowAttention": {"torchvision.": _torchvision},
    "ShiftedWindowAttentionV2": {"torchvision.": _torchvision},
    "SwinLayer": _TRANSFORMERS,
    "Swinv2Layer": _TRANSFORMERS,
    "DonutSwinLayer": _TRANSFORMERS,
    "MaskFormerSwinLayer": _TRANSFORMERS,
    "PartitionAttentionCl": {"timm.": _maxvit},
    "PartitionAttention2d": {"timm.": _maxvit},
    "SpatialBlock": {"timm.": _davit},
    "Block": {"timm.models.vision_transformer_sam.": _sam, "segment_anything.": _sam},
    "SamVisionLayer": {"transformers.": _sam},
    "LocallyGroupedAttn": {"timm.": _twins},
}
