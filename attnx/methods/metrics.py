"""Masks, entropy and the pointing game of maps over patches."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def entropy_levels(values: Tensor | np.ndarray, levels: int = 4) -> Tensor:
    """Groups of equal size by rank of entropy: 0 for the lowest (most focused), levels - 1 for the highest.

    Args:
        values: [K], or [K, ...] such as the entropies of K images in each layer and head, which are ranked over the
            images: a tensor or numpy array of any real dtype.
        levels: number of groups, at least 1.

    Returns:
        int64, shaped as `values`.

    Raises:
        ValueError: invalid values or levels.

    Example:
        >>> import torch, attnx
        >>> attnx.entropy_levels(torch.tensor([0.5, 3.0, 1.0, 2.0]), levels=2)
        tensor([0, 1, 0, 1])
    """
    values = _tensor("values", values, "[K, ...]")
    if values.dim() < 1 or levels < 1:
        raise ValueError(f"expected values [K, ...] and levels >= 1; got {list(values.shape)} and {levels}")
    rank = values.argsort(dim=0, stable=True).argsort(dim=0, stable=True)
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
