"""What is read from single maps: CLS maps, layer-wise maps, masks, entropy, pointing."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.ops.reducers import Reduction, fuse_heads
from attnx.trace.trace import Trace


def cls_map(trace: Trace, layer: str | int | None = None) -> Tensor:
    """What the class token attends to in one layer: [B, h, w], or [B, H, h, w] of a capture with heads="each".

    Not renormalised, as in DINO. Of an attention-pooling layer (one query) it is that query's map.

    Args:
        trace: a capture of all rows, or of row 0 among others.
        layer: name or index in the trace; None: the last layer in which the class token attends beside the patches, or,
            where there is no such layer, the last one with a single query.

    Raises:
        ValueError: the model has no class token, its row was not captured, or the layer's rows are other tokens.
    """
    name = cls_layer(trace) if layer is None else layer
    rows = _cls_rows(trace, name)
    return trace.layout_of(name).patches(rows)


def cls_layer(trace: Trace) -> str:
    """Name of the layer that `cls_map` reads unless another is asked for."""
    token = pool = None
    for name in trace:
        queries, keys = trace.sides(name)
        if queries == keys and keys.cls:
            token = name
        elif queries.count == 1:
            pool = name
    last = token or pool or next(reversed(list(trace)), None)
    if last is None:
        raise ValueError("cls_map: expected a trace of at least one layer; got none")
    return last


@dataclass(frozen=True)
class LayerMaps:
    """The class token's map in every layer: maps [B, L, h, w], and their max, min and mean over layers [B, h, w].

    Of heads="each": [B, L, H, h, w] and [B, H, h, w].
    """

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
    """The class token's map in every captured layer, and their max, min and mean over layers.

    Args:
        trace: a capture of all rows, or of row 0 among others.
        heads: how to fuse a capture with heads="each": "mean" unless given; "each" leaves the heads, [B, L, H, h, w].

    Raises:
        ValueError: the model has no class token, its row was not captured, or the layers have different tokens (lists
            them) or numbers of heads.
    """
    kind = fusion(trace, heads)
    layout = trace.layout
    rows = [_cls_rows(trace, name) for name in trace]
    fused = [fuse_heads(r[:, :, None], kind)[:, 0] if r.dim() == 3 and kind is not Reduction.EACH else r for r in rows]
    shapes = dict.fromkeys(tuple(r.shape) for r in fused)
    if len(shapes) > 1:
        raise ValueError(f"layer_maps: expected maps of one shape; got {', '.join(map(str, shapes))}; choose layers=")
    return LayerMaps(tuple(trace), layout.patches(torch.stack(fused, 1)))


def mass_mask(maps: Tensor | np.ndarray, keep: float = 0.6) -> Tensor:
    """The largest patches that together hold `keep` of each map's mass: [..., h, w] -> bool [..., h, w].

    Sorted ascending and divided by their sum, a patch stays where the running sum is above 1 - keep.

    Args:
        maps: [..., h, w], a tensor or a numpy array of any real dtype; summed in float32, or float64 of float64.
        keep: a share in [0, 1].

    Raises:
        ValueError: maps or keep are something else.

    Warns:
        UserWarning: these look like attention maps [N, N], not like pictures.

    Reference:
        DINO, https://github.com/facebookresearch/dino/blob/main/visualize_attention.py (--threshold)
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep: expected a share in [0, 1]; got {keep}")
    maps = _tensor("maps", maps, "[..., h, w]", 2)
    _warn_of_attention(maps)
    flat = maps.flatten(-2)
    # The running sum of half precision stops growing where a patch is less than its last bit.
    flat = flat if flat.dtype == torch.float64 else flat.float()
    values, order = torch.sort(flat, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    kept = torch.cumsum(values, dim=-1) > (1 - keep)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(maps.shape)


def entropy(maps: Tensor | np.ndarray) -> Tensor:
    """Entropy in nats of each map over its patches, [..., h, w] -> [...], the map first divided by its sum.

    0 for a map of a single patch, log(h * w) for an even one; NaN for a map without mass. Of attention maps [N, N],
    `torch.special.entr(maps).sum(-1)` is the entropy of each row.

    Args:
        maps: [..., h, w], a tensor or a numpy array of any real dtype; summed in float32.

    Raises:
        ValueError: maps are something else.

    Warns:
        UserWarning: these look like attention maps [N, N], not like pictures.
    """
    maps = _tensor("maps", maps, "[..., h, w]", 2)
    _warn_of_attention(maps)
    p = maps.flatten(-2).float()
    p = p / p.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1)


def entropy_levels(values: Tensor | np.ndarray, levels: int = 4) -> Tensor:
    """Equal groups by rank: [K] entropies -> [K] int64, 0 the most focused quarter, levels - 1 the most spread.

    Args:
        values: [K], a tensor or a numpy array of any real dtype.
        levels: how many groups, at least 1.

    Raises:
        ValueError: values or levels are something else.
    """
    values = _tensor("values", values, "[K]")
    if values.dim() != 1 or levels < 1:
        raise ValueError(f"expected 1-D values and levels >= 1; got {list(values.shape)} and {levels}")
    rank = values.argsort(stable=True).argsort(stable=True)
    return rank * levels // max(1, len(values))


def pointing_game(maps: Tensor | np.ndarray, boxes: Tensor | np.ndarray, size: tuple[int, int]) -> Tensor:
    """Whether each map's peak, at the image's own size, lies inside its box: bool [B].

    Args:
        maps: [B, h, w], upsampled bilinearly to `size`.
        boxes: [B, 4] pixels (x0, y0, x1, y1), half-open.
        size: (height, width) of the images in pixels. PIL's `image.size` is (width, height).

    Maps and boxes are tensors or numpy arrays of any real dtype; boxes go to the device of the maps.

    Raises:
        ValueError: maps or boxes are something else.

    Reference:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", https://arxiv.org/abs/1608.00507
    """
    maps = _tensor("maps", maps, "[B, h, w]")
    boxes = _tensor("boxes", boxes, "[B, 4]").to(maps.device)
    if maps.dim() != 3 or boxes.shape != (len(maps), 4):
        raise ValueError(f"expected maps [B, h, w] and boxes [B, 4]; got {list(maps.shape)} and {list(boxes.shape)}")
    full = F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)
    peak = full.flatten(1).argmax(1)
    x, y = peak % size[1], peak // size[1]
    x0, y0, x1, y1 = boxes.unbind(1)
    return (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)


def fusion(trace: Trace, heads: str | None) -> Reduction:
    """How the heads of a trace with heads="each" are to be fused; EACH where the capture has fused them.

    Raises:
        ValueError: `heads` is another fusion than the capture's.
    """
    if trace.heads == "each":
        return Reduction.parse(heads or "mean")
    if heads not in (None, trace.heads):
        raise ValueError(f"heads: the capture fused them by {trace.heads!r}; got {heads!r}; capture with that")
    return Reduction.EACH


def _tensor(name: str, value: object, shape: str, least: int = 0) -> Tensor:
    """A real tensor as it is, or a numpy array as one: a copy."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.itemsize <= 8:
        # torch has few operations on other unsigned integers than bytes, and no other byte order than the machine's.
        dtype = np.dtype(np.int64) if value.dtype.kind == "u" else value.dtype.newbyteorder("=")
        value = torch.from_numpy(np.array(value, dtype=dtype, order="C"))
    if not isinstance(value, Tensor) or value.is_complex() or value.dim() < least:
        if isinstance(value, (Tensor, np.ndarray)):
            got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        else:
            got = type(value).__name__
        raise ValueError(f"{name}: expected a real tensor or numpy array {shape}; got {got}")
    return value


def _warn_of_attention(maps: Tensor) -> None:
    """Warns of maps [..., N, N] whose rows all sum to 1, which only attention's do."""
    if maps.shape[-2] != maps.shape[-1] or maps.shape[-1] < 2 or maps.numel() == 0:
        return
    sums = maps.detach().sum(-1, dtype=torch.float32)
    if bool(((sums - 1).abs() <= 1e-3).all()):
        warnings.warn(
            f"maps: {list(maps.shape)} with rows that sum to 1 looks like attention maps [N, N] and not like pictures "
            "[h, w]; pass trace.layout.patches(trace[layer][:, 0]) or attnx.cls_map(trace, layer) for a picture; "
            "torch.special.entr(maps).sum(-1) is the entropy of each row",
            stacklevel=3,
        )


def _cls_rows(trace: Trace, layer: str | int) -> Tensor:
    """[B, N] (or [B, H, N]) of the class token in a layer, or of a pooling layer's only query."""
    kept = trace.kept(layer)
    queries, keys = trace.sides(layer)
    if queries.count != 1:
        layout = trace.layout_of(layer)
        if not layout.cls:
            raise ValueError(f"the model has no class token ({layout}); use rollout, or read trace[{layer!r}]")
        if queries != keys:
            raise ValueError(f"layer {layer!r}: expected rows of the image's tokens; got {queries} over {keys}")
    if trace.rows is None:
        return kept.row(0)
    if 0 not in trace.rows:
        raise ValueError(f"the class token's row was not captured: expected 0 among rows; got {list(trace.rows)}")
    return kept.row(trace.rows.index(0))
