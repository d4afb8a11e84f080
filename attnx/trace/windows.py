"""Windows of windowed attention: which tokens of the grid attend to one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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


def merges(module: nn.Module) -> bool:
    """True for patch merging that concatenates 2 x 2 tokens, as in Swin."""
    if type(module).__name__ not in _MERGES:
        return False
    # Other models give this name to convolutions.
    reduction = getattr(module, "reduction", None)
    return isinstance(reduction, nn.Linear) and reduction.in_features % 4 == 0
