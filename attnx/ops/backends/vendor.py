"""The vendor's fused attention with its log-sum-exp, where it gives both exactly. Not a backend: backends try it first.

Torch's `F.scaled_dot_product_attention` computes the log-sum-exp of every row and drops it; the operators behind it
give it. It is natural, as torch's own ring attention merges it.

Reference:
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/attention.cu;
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cpu/FlashAttentionKernel.cpp
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from attnx.ops.reducers import MASK_THRESHOLD
from attnx.ops.scores import Scores


def output_and_lse(scores: Scores, v: Tensor, with_nan: bool = True) -> tuple[Tensor, Tensor] | None:
    """Output [B,H,M,Dv] in q's dtype and lse [B,H,M], as `ops.functional.attention_lse`; None where it can't serve.

    The lse is float32, for float64 inputs float64.

    On GPUs: what SDPA itself would choose, cuDNN or flash attention, for half precision without a bias. On CPUs: any
    bias or mask, which is copied in the dtype of the computation. Half precision is copied to float32 first on CPUs,
    since the vendor's kernel for it takes an exponential of 20 bits, whose log-sum-exp would spoil the map. A bias that
    repeats over the batch would have to be copied for every item, so none is taken.

    Args:
        scores: not empty, with at least one key; v likewise.
        with_nan: False: on GPUs the lse of a row with NaN may be plus infinity, which saves a launch.
    """
    q, k = scores.q, scores.k
    if scores.softcap or scores.bias_repeats or q.shape[3] != v.shape[3] or any(t.stride(3) != 1 for t in (q, k, v)):
        return None
    if scores.is_causal and scores.scale <= 0:
        return None  # it masks before it scales, which gives NaN
    if q.device.type == "cpu":
        return _on_cpu(scores, v)
    if q.device.type == "cuda" and scores.bias is None:
        return _on_cuda(scores, v, with_nan)
    return None


def _on_cuda(scores: Scores, v: Tensor, with_nan: bool) -> tuple[Tensor, Tensor] | None:
    q, k, _, is_causal, scale, _ = scores
    # Above Hopper the exponential may be a polynomial as exact as half precision: nobody has measured its lse.
    known = torch.version.hip is None and (8, 0) <= torch.cuda.get_device_capability(q.device) < (10, 0)
    half = q.dtype in (torch.float16, torch.bfloat16)
    same = q.shape[1] == k.shape[1] and (not is_causal or q.shape[2] == k.shape[2])
    if not (known and half and same and scale > 0 and hasattr(torch, "_fused_sdp_choice")):
        return None
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, is_causal, scale=scale)
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse = cudnn(q, k, v, None, True, 0.0, is_causal, scale=scale)[:2]
    elif choice == SDPBackend.FLASH_ATTENTION.value and q.shape[3] % 8 == 0:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(q, k, v, 0.0, is_causal, scale=scale)[:2]
    else:
        return None
    # cuDNN's has a last dimension of 1. Flash attention says plus infinity of a row with a NaN; none is without keys.
    lse = lse.reshape(q.shape[:3]).contiguous()
    if with_nan:
        lse.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=-torch.inf)
    return _rows_first(out), lse


def _on_cpu(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor] | None:
    q, k, bias, is_causal, scale, _ = scores
    flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if flash is None:
        return None
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = scores.group
    wide = [q.to(compute), *(t.to(compute).repeat_interleave(group, 1) if group > 1 else t.to(compute) for t in (k, v))]
    mask = None if bias is None else _additive(bias, compute)
    out, lse = flash(*wide, 0.0, is_causal, attn_mask=mask, scale=scale)
    out, lse = _rows_first(out.to(q.dtype)), lse.contiguous()
    lse.masked_fill_(lse == torch.inf, torch.nan)  # an infinite score: its row of the output is NaN
    if mask is not None:
        empty = _rows_without_keys(mask, is_causal, q.shape[2], k.shape[2])
        lse.masked_fill_(empty, -torch.inf)
        out.masked_fill_(empty[..., None], 0.0)
    return out, lse


def _additive(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias as a float one, minus infinity where it hides a key."""
    if bias.dtype == torch.bool:
        return torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill_(~bias, -torch.inf)
    return bias.to(dtype).masked_fill(bias < MASK_THRESHOLD, -torch.inf)


def _rows_without_keys(mask: Tensor, is_causal: bool, rows: int, keys: int) -> Tensor:
    """[1|B, 1|H, 1|M] bool, of an additive mask: True where the first key that it shows lies beyond what a row sees."""
    shown = mask != -torch.inf
    first = torch.where(shown.any(-1), shown.view(torch.uint8).argmax(-1), keys)
    return first > torch.arange(rows, device=mask.device) if is_causal else first == keys


def _rows_first(out: Tensor) -> Tensor:
    """Rows before heads in memory; a copy where the vendor has them the other way round."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
