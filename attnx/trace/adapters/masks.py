"""Additive masks in the form that SDPA expects."""

import torch
from torch import Tensor


def as_bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The additive mask in the dtype that SDPA computes in, with its most negative numbers kept finite.

    Autocast would turn float32's lowest number into minus infinity, and a row of only such values into NaN.
    """
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    if mask is None or mask.dtype == dtype or q.dtype == torch.float64 == mask.dtype:
        return mask
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)
