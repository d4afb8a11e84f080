"""The parts of LAVT's Swin transformer that do not see words: windows, patches and their merging.

As in Swin's detection code, a grid that is no multiple of the window is padded first and shifted afterwards; padded
tokens have keys, too.

Reference:
    Liu et al., "Swin Transformer", https://arxiv.org/abs/2103.14030; https://github.com/yz93/LAVT-RIS, lib/backbone.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4


class WindowAttention(nn.Module):
    """Self-attention of the tokens of each window, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = place[:, None] - place[None] + window - 1
        self.register_buffer("relative_position_index", offset[..., 0] * (2 * window - 1) + offset[..., 1])
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """x [B * windows, K, C]; `hidden` [windows, K, K]: -100 where tokens are not neighbours in the image."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if hidden is not None:
            # [B, windows, H, K, D], so that the bias [windows, H, K, K] broadcasts over the images.
            q, k, v = (t.unflatten(0, (-1, len(hidden))) for t in (q, k, v))
            bias = bias + hidden[:, None]
        out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
        projected: Tensor = self.proj(out.transpose(-2, -3).flatten(-2)).view_as(x)
        return projected


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwinBlock(nn.Module):
    """A Swin block. Odd blocks shift their windows by half a window."""

    def __init__(self, dim: int, window: int, heads: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x [B, h * w, C] of the grid (h, w) -> the same shape."""
        (h, w), n, s = grid, self.window, self.shift
        tokens = F.pad(self.norm1(x).unflatten(1, grid), (0, 0, 0, -w % n, 0, -h % n))
        tokens = tokens.roll((-s, -s), (1, 2)) if s else tokens
        rows, columns = tokens.shape[1] // n, tokens.shape[2] // n
        windows = tokens.unflatten(2, (columns, n)).unflatten(1, (rows, n)).transpose(2, 3)
        hidden = _hidden(rows, columns, n, s, x.device) if s else None
        out = self.attn(windows.reshape(-1, n * n, x.shape[2]), hidden)
        out = out.view(windows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        out = out.roll((s, s), (1, 2)) if s else out
        x = x + out[:, :h, :w].flatten(1, 2)
        x = x + self.mlp(self.norm2(x))
        return x


def _hidden(rows: int, columns: int, n: int, shift: int, device: torch.device) -> Tensor:
    """[windows, K, K]: -100 for two tokens of a shifted window that come from opposite borders of the image, else 0."""

    def side(windows: int) -> Tensor:
        i = torch.arange(windows * n, device=device)
        return (i >= (windows - 1) * n).long() + (i >= windows * n - shift).long()

    region = 3 * side(rows)[:, None] + side(columns)
    region = region.unflatten(1, (columns, n)).unflatten(0, (rows, n)).transpose(1, 2).reshape(-1, n * n)
    hidden: Tensor = (region[:, :, None] != region[:, None]) * -100.0
    return hidden


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels; the image is padded with zeros on the right and at the bottom."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, 3, H, W] -> the tokens [B, h * w, C], and their grid (h, w)."""
        height, width = images.shape[2:]
        x = self.proj(F.pad(images, (0, -width % PATCH, 0, -height % PATCH)))
        tokens: Tensor = self.norm(x.flatten(2).mT)
        return tokens, (x.shape[2], x.shape[3])


class PatchMerging(nn.Module):
    """Four neighbours become one token; an odd grid is padded with zeros on the right and at the bottom."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h * w, C] -> [B, ceil(h / 2) * ceil(w / 2), 2 C]."""
        h, w = grid
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, w % 2, 0, h % 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # [B, h, 2, w, 2, C]; the weights expect the row within the pair to change first.
        merged: Tensor = self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)))
        return merged
