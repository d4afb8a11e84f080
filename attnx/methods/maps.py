"""What is read from single maps: CLS maps, layer-wise maps, masks, entropy, pointing."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.reducers import Heads, fuse_heads
from attnx.trace import Trace


def cls_map(trace: Trace, layer: str | int = -1) -> Tensor:
    """What the class token attends to in one layer: [B, h, w], or [B, H, h, w] of a capture with heads="each".

    Not renormalised, as in DINO. Of an attention-pooling layer (one query) it is that query's map.

    Raises:
        ValueError: the model has no class token, or its row was not captured.
    """
    return trace.layout.patches(_cls_rows(trace, layer))


@dataclass(frozen=True)
class LayerMaps:
    """The class token's map in every layer: maps [B, L, h, w], and their max, min and mean over layers [B, h, w]."""

    names: tuple[str, ...]
    maps: Tensor

    @property
    def max(self) -> Tensor:
        return self.maps.amax(1)

    @property
    def min(self) -> Tensor:
        return self.maps.amin(1)

    @property
    def mean(self) -> Tensor:
        return self.maps.mean(1)


def layer_maps(trace: Trace, heads: str | None = None) -> LayerMaps:
    """The class token's head-fused map in every captured layer, and their max, min and mean over layers.

    Raises:
        ValueError: the model has no class token, or its row was not captured.
    """
    kind = fusion(trace, heads)
    rows = [_cls_rows(trace, name) for name in trace]
    fused = [fuse_heads(r[:, :, None], kind)[:, 0] if r.dim() == 3 else r for r in rows]
    return LayerMaps(tuple(trace), trace.layout.patches(torch.stack(fused, 1)))


def mass_mask(maps: Tensor, keep: float = 0.6) -> Tensor:
    """The largest patches that together hold `keep` of each map's mass: [..., h, w] -> bool [..., h, w].

    Sorted ascending and divided by their sum, a patch stays where the running sum is above 1 - keep.

    Reference:
        DINO, https://github.com/facebookresearch/dino/blob/main/visualize_attention.py (--threshold)
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep: expected a share in [0, 1]; got {keep}")
    flat = maps.flatten(-2)
    values, order = torch.sort(flat, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    kept = torch.cumsum(values, dim=-1) > (1 - keep)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(maps.shape)


def entropy(maps: Tensor) -> Tensor:
    """Entropy in nats of each map over its patches, [..., h, w] -> [...], the map first divided by its sum.

    0 for a map of a single patch, log(h * w) for an even one; NaN for a map without mass.
    """
    p = maps.flatten(-2).float()
    p = p / p.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1)


def entropy_levels(values: Tensor, levels: int = 4) -> Tensor:
    """Equal groups by rank: [K] entropies -> [K] int64, 0 the most focused quarter, levels - 1 the most spread."""
    if values.dim() != 1 or levels < 1:
        raise ValueError(f"expected 1-D values and levels >= 1; got {list(values.shape)} and {levels}")
    rank = values.argsort(stable=True).argsort(stable=True)
    return rank * levels // max(1, len(values))


def pointing_game(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether each map's peak, at the image's own size, lies inside its box: bool [B].

    Args:
        maps: [B, h, w], upsampled bilinearly to `size`.
        boxes: [B, 4] pixels (x0, y0, x1, y1), half-open.
        size: (height, width) of the images in pixels.

    Reference:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", https://arxiv.org/abs/1608.00507
    """
    if maps.dim() != 3 or boxes.shape != (len(maps), 4):
        raise ValueError(f"expected maps [B, h, w] and boxes [B, 4]; got {list(maps.shape)} and {list(boxes.shape)}")
    full = F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)
    peak = full.flatten(1).argmax(1)
    x, y = peak % size[1], peak // size[1]
    x0, y0, x1, y1 = boxes.unbind(1)
    return (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)


def fusion(trace: Trace, heads: str | None) -> Heads:
    """How the heads of a trace with heads="each" are to be fused; EACH where the capture has fused them.

    Raises:
        ValueError: `heads` is another fusion than the capture's.
    """
    if trace.heads == "each":
        return Heads.parse(heads or "mean")
    if heads not in (None, trace.heads):
        raise ValueError(f"heads: the capture fused them by {trace.heads!r}; got {heads!r}; capture with that")
    return Heads.EACH


def _cls_rows(trace: Trace, layer: str | int) -> Tensor:
    """[B, N] (or [B, H, N]) of the class token in a layer, or of a pooling layer's only query."""
    kept = trace.kept(layer)
    if trace.rows is None and kept.shape[-2] == 1:
        return kept.row(0)
    if not trace.layout.cls:
        raise ValueError(f"the model has no class token ({trace.layout}); use rollout, or read trace[{layer!r}]")
    if trace.rows is None:
        return kept.row(0)
    if 0 not in trace.rows:
        raise ValueError(f"the class token's row was not captured: expected 0 among rows; got {list(trace.rows)}")
    return kept.row(trace.rows.index(0))
