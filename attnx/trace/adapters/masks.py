"""Masks that are added to the scores, as SDPA wants them."""

import torch
from torch import Tensor


def as_bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The additive mask in the dtype that SDPA computes in; its most negative numbers stay finite.

    Autocast alone would make minus infinity of float32's lowest number, and a row of nothing else NaN.
    """
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    if mask is None or mask.dtype == dtype or q.dtype == torch.float64 == mask.dtype:
        return mask
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)
