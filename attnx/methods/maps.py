"""Methods on single maps: CLS maps, layer-wise maps, masks, entropy, pointing game."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.ops.reducers import Reduction, fuse_heads
from attnx.trace.trace import Trace


def cls_map(trace: Trace, layer: str | int | None = None) -> Tensor:
    """Attention of the class token to the patches in one layer, not renormalised, as in DINO.

    For an attention-pooling layer, which has one query, it is the map of that query.

    Args:
        trace: a capture of all rows, or of rows that include 0.
        layer: name or index in the trace; None: the last self-attention layer with a class token, or else the last
            layer with a single query.

    Returns:
        [B, h, w] float32, or [B, H, h, w] for a capture with heads="each".

    Raises:
        ValueError: the model has no class token, its row was not captured, or the layer's rows are not tokens of the
            image.
        KeyError: no such layer was captured.

    Reference:
        DINO, https://github.com/facebookresearch/dino/blob/main/visualize_attention.py

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> attnx.cls_map(trace).shape
        torch.Size([2, 12, 12])
    """
    name = cls_layer(trace) if layer is None else layer
    rows = _cls_rows(trace, name)
    return trace.layout_of(name).patches(rows)


def cls_layer(trace: Trace) -> str:
    """Name of the layer that `cls_map` reads by default."""
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
    """The class token's map in every layer, and the max, min and mean over layers.

    Attributes:
        names: the L layers.
        maps: [B, L, h, w] float32, or [B, L, H, h, w] for heads="each".
        max, min, mean: [B, h, w], or [B, H, h, w] for heads="each".
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
    """The class token's map in every captured layer, and the max, min and mean over layers.

    Args:
        trace: a capture of all rows, or of rows that include 0.
        heads: how to fuse the heads of a capture with heads="each": "mean" (default), "max", "min", or "each" to keep
            them. For other captures it must be the capture's own value.

    Returns:
        `LayerMaps`: maps [B, L, h, w], or [B, L, H, h, w] for heads="each", and max, min and mean without L.

    Raises:
        ValueError: the model has no class token, its row was not captured, or the layers have different tokens (the
            message lists them) or numbers of heads.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> with torch.no_grad(), attnx.capture(model) as trace:
        ...     logits = model(torch.rand(2, 3, 96, 96))
        >>> layers = attnx.layer_maps(trace)
        >>> layers.maps.shape, layers.mean.shape
        (torch.Size([2, 4, 12, 12]), torch.Size([2, 12, 12]))
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
    """Mask of the largest patches that together hold the share `keep` of each map's mass.

    The patches are sorted in ascending order and divided by their sum. A patch is True if the running sum exceeds
    1 - keep.

    Args:
        maps: [..., h, w], a tensor or numpy array of any real dtype; summed in float32, or in float64 for float64.
        keep: a share in [0, 1].

    Returns:
        [..., h, w] bool.

    Raises:
        ValueError: invalid maps or `keep`.

    Warns:
        UserWarning: the maps look like attention maps [N, N] instead of maps over patches.

    Reference:
        DINO, https://github.com/facebookresearch/dino/blob/main/visualize_attention.py (--threshold)

    Example:
        >>> import torch, attnx
        >>> attnx.mass_mask(torch.tensor([[0.5, 0.3], [0.15, 0.05]]), keep=0.6)
        tensor([[ True,  True],
                [False, False]])
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep: expected a share in [0, 1]; got {keep}")
    maps = _tensor("maps", maps, "[..., h, w]", 2)
    _warn_of_attention(maps)
    flat = maps.flatten(-2)
    # In half precision the running sum would stop growing at patches below its last bit.
    flat = flat if flat.dtype == torch.float64 else flat.float()
    values, order = torch.sort(flat, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    inside = torch.cumsum(values, dim=-1) > (1 - keep)
    return torch.zeros_like(inside).scatter_(-1, order, inside).view(maps.shape)


def entropy(maps: Tensor | np.ndarray) -> Tensor:
    """Entropy of each map over its patches, in nats: ``-sum_i p_i log p_i`` with ``p = map / sum(map)``.

    It is 0 for a map with a single nonzero patch, log(h * w) for a uniform map, and NaN for a map without mass. For the
    rows of attention maps [N, N], use `torch.special.entr(maps).sum(-1)`.

    Args:
        maps: [..., h, w], a tensor or numpy array of any real dtype; summed in float32.

    Returns:
        [...] float32.

    Raises:
        ValueError: invalid maps.

    Warns:
        UserWarning: the maps look like attention maps [N, N] instead of maps over patches.

    Example:
        >>> import torch, attnx
        >>> attnx.entropy(torch.ones(2, 12, 12))
        tensor([4.9698, 4.9698])
    """
    maps = _tensor("maps", maps, "[..., h, w]", 2)
    _warn_of_attention(maps)
    p = maps.flatten(-2).float()
    p = p / p.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1)


def entropy_levels(values: Tensor | np.ndarray, levels: int = 4) -> Tensor:
    """Groups of equal size by rank of entropy: 0 for the lowest (most focused), levels - 1 for the highest.

    Args:
        values: [K], a tensor or numpy array of any real dtype.
        levels: number of groups, at least 1.

    Returns:
        [K] int64.

    Raises:
        ValueError: invalid values or levels.

    Example:
        >>> import torch, attnx
        >>> attnx.entropy_levels(torch.tensor([0.5, 3.0, 1.0, 2.0]), levels=2)
        tensor([0, 1, 0, 1])
    """
    values = _tensor("values", values, "[K]")
    if values.dim() != 1 or levels < 1:
        raise ValueError(f"expected 1-D values and levels >= 1; got {list(values.shape)} and {levels}")
    rank = values.argsort(stable=True).argsort(stable=True)
    return rank * levels // max(1, len(values))


def pointing_game(maps: Tensor | np.ndarray, boxes: Tensor | np.ndarray, size: tuple[int, int]) -> Tensor:
    """Pointing game: True for each map whose peak, at the size of the image, lies inside its box.

    Args:
        maps: [B, h, w], upsampled bilinearly to `size`.
        boxes: [B, 4] (x0, y0, x1, y1) in pixels, half-open; copied to the device of the maps.
        size: (height, width) of the images in pixels. PIL's `image.size` is (width, height).

    Maps and boxes are tensors or numpy arrays of any real dtype.

    Returns:
        [B] bool.

    Raises:
        ValueError: invalid maps or boxes.

    Reference:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", https://arxiv.org/abs/1608.00507

    Example:
        >>> import torch, attnx
        >>> amap = torch.zeros(1, 4, 4)
        >>> amap[0, 1, 2] = 1
        >>> attnx.pointing_game(amap, torch.tensor([[16, 8, 24, 16]]), (32, 32))
        tensor([True])
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
    """The reduction of a trace's heads that remains to be applied; EACH if the capture fused them.

    Raises:
        ValueError: `heads` differs from the capture's `heads`.
    """
    if trace.heads == "each":
        return Reduction.parse(heads or "mean")
    if heads not in (None, trace.heads):
        raise ValueError(
            f"heads: the capture fused them by {trace.heads!r}; got {heads!r}; capture with heads={heads!r}"
        )
    return Reduction.EACH


def _tensor(name: str, value: object, shape: str, least: int = 0) -> Tensor:
    """A real tensor unchanged, or a numpy array as a tensor (copied)."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.itemsize <= 8:
        # torch supports few operations on unsigned integers beyond uint8, and only the native byte order.
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
    """Warn about maps [..., N, N] whose rows all sum to 1, as those of attention maps do."""
    if maps.shape[-2] != maps.shape[-1] or maps.shape[-1] < 2 or maps.numel() == 0:
        return
    sums = maps.detach().sum(-1, dtype=torch.float32)
    if bool(((sums - 1).abs() <= 1e-3).all()):
        warnings.warn(
            f"maps: {list(maps.shape)} with rows that sum to 1 look like attention maps [N, N] instead of maps over "
            "patches [h, w]; pass trace.layout.patches(trace[layer][:, 0]) or attnx.cls_map(trace, layer); "
            "torch.special.entr(maps).sum(-1) is the entropy of each row",
            stacklevel=3,
        )


def _cls_rows(trace: Trace, layer: str | int) -> Tensor:
    """Row of the class token in a layer, or of a pooling layer's only query: [B, N] or [B, H, N]."""
    record = trace.kept(layer)
    queries, keys = trace.sides(layer)
    if queries.count != 1:
        layout = trace.layout_of(layer)
        if not layout.cls:
            raise ValueError(f"the model has no class token ({layout}); use rollout, or read trace[{layer!r}]")
        if queries != keys:
            raise ValueError(f"layer {layer!r}: expected rows of the image's tokens; got {queries} over {keys}")
    if trace.rows is None:
        return record.row(0)
    if 0 not in trace.rows:
        raise ValueError(f"the class token's row was not captured: expected 0 among rows; got {list(trace.rows)}")
    return record.row(trace.rows.index(0))
