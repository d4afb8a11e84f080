"""What is made of the maps: rollout, CLS maps, layer-wise maps, masks, entropy. Pure functions of a Trace or maps."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.reducers import Heads, fuse_heads
from attnx.trace import Trace


def rollout(
    trace: Trace,
    residual: float = 0.5,
    discard: float = 0.0,
    start: int = 0,
    *,
    heads: str | None = None,
    preset: str | None = None,
    rows: str | int | None = None,
) -> Tensor:
    """Attention rollout: how much of each patch reaches the class token through all layers.

    ``M_l = (1 - residual) F_l + residual I``, rows normalised, and the row of ``M_L ... M_start`` that belongs to the
    class token, over the patches. It is computed as a chain of vector products from the last layer to the first.

    Args:
        trace: a capture of whole maps (rows=None).
        residual: weight of the identity; 0.5 is Abnar & Zuidema's.
        discard: share of each item's smallest entries of F to set to zero, the class token's own entry spared.
        start: first layer of the product; Chefer et al. use 1.
        heads: how to fuse a capture with heads="each" ("mean" unless given); otherwise it must be the capture's own.
        preset: "vit-explain" divides column j by row j's sum instead of row j (that code's arithmetic), and the result
            by its maximum. Give `discard` yourself (its class's default is 0.9).
        rows: the query to follow: an index, "mean" over the patches, or "all". Unless given: the class token, or where
            the model has none, its attention-pooling layer if that was captured too, else "mean".

    Returns:
        [B, h, w] float32; for rows="all" the product itself, [B, N, N].

    Raises:
        ValueError: the trace has no whole maps of one size, or an argument is out of range.

    Reference:
        Abnar & Zuidema, "Quantifying Attention Flow in Transformers", https://arxiv.org/abs/2005.00928;
        https://github.com/jacobgil/vit-explain
    """
    if not 0.0 <= residual <= 1.0 or not 0.0 <= discard < 1.0:
        raise ValueError(f"expected residual in [0, 1] and discard in [0, 1); got {residual} and {discard}")
    if preset not in (None, "vit-explain"):
        raise ValueError(f"preset: expected None or 'vit-explain'; got {preset!r}")
    layout = trace.layout
    maps, pool = _self_attention(trace, _fusion(trace, heads))
    if not 0 <= start < len(maps):
        raise ValueError(f"start: expected a layer index in 0..{len(maps) - 1}; got {start}")
    result = _start_vectors(maps[-1], pool, rows, layout.cls is True, layout.prefix)
    for fused in reversed(maps[start:]):
        if discard:
            fused = _discard(fused, discard)
        sums = (1 - residual) * fused.sum(-1) + residual
        weight = torch.where(sums > 0, 1 / sums, 0.0)[:, None]  # a row without any weight passes nothing on
        if preset is None:
            result = result * weight
        step = (1 - residual) * torch.bmm(result, fused) + residual * result
        result = step * weight if preset else step
    if rows == "all":
        return result
    patches = layout.patches(result[:, 0])
    return patches / patches.amax((-2, -1), keepdim=True) if preset else patches


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
    kind = _fusion(trace, heads)
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


def _fusion(trace: Trace, heads: str | None) -> Heads:
    if trace.heads == "each":
        return Heads.parse(heads or "mean")
    if heads not in (None, trace.heads):
        raise ValueError(f"heads: the capture fused them by {trace.heads!r}; got {heads!r}; capture with that")
    return Heads.EACH


def _self_attention(trace: Trace, kind: Heads) -> tuple[list[Tensor], Tensor | None]:
    """The whole [B, N, N] maps from first layer to last, heads fused; and a final pooling layer's [B, 1, N]."""
    if trace.rows is not None:
        raise ValueError(f"rollout needs whole maps: expected a capture with rows=None; got rows={list(trace.rows)}")
    n = trace.layout.tokens
    maps: list[Tensor] = []
    pool: Tensor | None = None
    for name, amap in trace.items():
        if "#" in name or re.search(r"\.attns\.\d", name):
            raise ValueError(f"rollout: expected layers in a row; {name} attends beside another; choose layers=")
        fused = fuse_heads(amap, kind) if amap.dim() == 4 else amap
        if fused.shape[1:] == (n, n) and pool is None:
            maps.append(fused)
        elif fused.shape[1:] == (1, n) and pool is None:
            pool = fused
        else:
            raise ValueError(
                f"rollout: expected maps of {n} x {n} tokens; got {list(fused.shape[1:])} from {name}; "
                "choose layers= of one self-attention stack"
            )
    if not maps:
        raise ValueError("rollout: expected at least one self-attention layer in the trace; got none")
    return maps, pool


def _start_vectors(last: Tensor, pool: Tensor | None, rows: str | int | None, cls: bool, prefix: int) -> Tensor:
    """[B, R, N]: what the chain starts from at the output of the last layer."""
    B, n, _ = last.shape
    if rows is None and not cls and pool is not None:
        return pool
    if rows == "all":
        return torch.eye(n, device=last.device).expand(B, n, n)
    start = last.new_zeros(B, 1, n)
    if rows == "mean" or (rows is None and not cls):
        start[..., prefix:] = 1 / (n - prefix)
    elif rows is None or (isinstance(rows, int) and 0 <= rows < n):
        start[..., rows or 0] = 1
    else:
        raise ValueError(f"rows: expected 'all', 'mean' or an index in 0..{n - 1}; got {rows!r}")
    return start


def _discard(fused: Tensor, share: float) -> Tensor:
    """Each item's int(N * N * share) smallest entries set to zero, entry (0, 0) spared."""
    flat = fused.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * share), 1, largest=False, sorted=False).indices
    dropped = flat.scatter(1, smallest, 0.0)
    dropped[:, 0] = flat[:, 0]
    return dropped.view_as(fused)


def _cls_rows(trace: Trace, layer: str | int) -> Tensor:
    """[B, N] (or [B, H, N]) of the class token in a layer, or of a pooling layer's only query."""
    amap = trace[layer]
    if trace.rows is None and amap.shape[-2] == 1:
        return amap[..., 0, :]
    if not trace.layout.cls:
        raise ValueError(f"the model has no class token ({trace.layout}); use rollout, or read trace[{layer!r}]")
    if trace.rows is None:
        return amap[..., 0, :]
    if 0 not in trace.rows:
        raise ValueError(f"the class token's row was not captured: expected 0 among rows; got {list(trace.rows)}")
    return amap[..., trace.rows.index(0), :]
