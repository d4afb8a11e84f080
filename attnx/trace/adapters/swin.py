"""Adapter for Swin's window attention: forwards that call SDPA instead of computing the softmax themselves.

Supported are the classes of microsoft/Swin-Transformer (versions 1 and 2) with their copies, such as LAVT's, and those
of timm, transformers and torchvision that have no SDPA. See `known` for how blocks are recognised.

q, k and v are [B * windows, H, K, D] for windows of K tokens. The relative position bias [1, H, K, K] is added to the
scores. Shifted blocks also have a mask [windows, K, K], which repeats for each image, see `_attend`.

Reference:
    https://github.com/microsoft/Swin-Transformer, models/swin_transformer.py and models/swin_transformer_v2.py
"""

import math
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.trace.adapters.known import Known
from attnx.trace.adapters.masks import as_bias
from attnx.trace.adapters.rewriting import arithmetic, drops, output, project

_ENDS = {"num_heads", "softmax", "attn_drop", "proj", "proj_drop"}
_COSINE = {"normalize", "clamp", "logit_scale", "exp", "log"}
_TABLE = {"relative_coords_table", "relative_position_index", "window_size", "sigmoid"}
_V1 = _ENDS | {"qkv", "scale", "relative_position_bias_table", "relative_position_index", "window_size"}
_V2 = _ENDS | _COSINE | _TABLE | {"qkv", "q_bias", "v_bias", "cpb_mlp", "cat", "linear", "weight"}
_CR = _ENDS | _COSINE | {"qkv", "_relative_positional_encodings"}
_SWINV2 = (
    _COSINE | _TABLE | {"query", "key", "value", "num_attention_heads", "attention_head_size", "all_head_size",
                        "continuous_position_bias_mlp", "softmax", "dropout", "matmul"}
)  # fmt: skip
_TORCHVISION = {"get_relative_position_bias", "shifted_window_attention", "qkv", "weight", "proj", "window_size",
                "num_heads", "shift_size", "attention_dropout", "dropout", "bias", "training"}  # fmt: skip
_SHIFTED = {"pad", "roll", "clone", "numel", "zero_", "linear", "normalize", "clamp", "log", "exp", "matmul",
            "new_zeros", "masked_fill", "softmax", "dropout"}  # fmt: skip
# Names that change only layouts, or that come with the names above.
_LAYOUT = {"F", "contiguous", "functional", "math", "nn", "permute", "reshape", "shape", "size", "tensor", "torch",
           "transpose", "unbind", "unsqueeze", "view", "zeros_like"}  # fmt: skip
_SHIFTED_OPERATORS = {"@": 1, "*": 7, "**": 1, "%": 4, "+": 2, "+=": 1, "-": 3}
_SHIFTED_LAYOUT = _LAYOUT | {"copy", "float", "sum"}


def _is_shifted(forward: FunctionType) -> bool:
    """True if the function that a torchvision block calls is the one that `_torchvision` computes."""
    function = forward.__globals__.get("shifted_window_attention")
    if not isinstance(function, FunctionType):
        return False
    uses = set(function.__code__.co_names)
    return _SHIFTED <= uses <= _SHIFTED | _SHIFTED_LAYOUT and arithmetic(function) == _SHIFTED_OPERATORS


def _v1(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output of the attention of version 1: x [B * windows, K, C], mask [windows, K, K]."""
    if _has_own(self) or not isinstance(self.scale, int | float):
        result: Tensor = type(self).forward(self, x, mask)
        return result
    q, k, v = project(self, x)
    bias = _gather(self, self.relative_position_bias_table)
    return output(self, _attend(q, k, v, bias, mask, self.scale))


def _v2(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output of microsoft's attention of version 2: x [B * windows, K, C], mask [windows, K, K]."""
    if _has_own(self):
        result: Tensor = type(self).forward(self, x, mask)
        return result
    packed = None if self.q_bias is None else torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
    bias = 16 * _gather(self, self.cpb_mlp(self.relative_coords_table).flatten(0, -2)).sigmoid()
    return output(self, _cosine(_split(self, F.linear(x, self.qkv.weight, packed)), self.logit_scale, bias, mask))


def _v2_timm(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output of timm's attention of version 2: x [B * windows, K, C], mask [windows, K, K]."""
    if _has_own(self):
        result: Tensor = type(self).forward(self, x, mask)
        return result
    if self.q_bias is None:
        qkv = self.qkv(x)
    else:
        packed = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate:
            qkv = self.qkv(x)
            qkv += packed
        else:
            qkv = F.linear(x, self.qkv.weight, packed)
    bias = 16 * _gather(self, self.cpb_mlp(self.relative_coords_table).flatten(0, -2)).sigmoid()
    return output(self, _cosine(_split(self, qkv), self.logit_scale, bias, mask))


def _cr(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output of timm's `swin_transformer_v2_cr` attention: x [B * windows, K, C], mask [windows, K, K]."""
    if _has_own(self):
        result: Tensor = type(self).forward(self, x, mask)
        return result
    qkv = project(self, x)
    bias = self._relative_positional_encodings()
    return output(self, _cosine(qkv, self.logit_scale.view(-1, 1, 1), bias, mask))


def _swinv2(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> tuple[Tensor, ...]:
    """(context,) of transformers' `Swinv2SelfAttention`: hidden_states [B * windows, K, C]."""
    if drops(self.dropout) or output_attentions:
        result: tuple[Tensor, ...] = type(self).forward(self, hidden_states, attention_mask, output_attentions)
        return result
    qkv = [
        layer(hidden_states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
        for layer in (self.query, self.key, self.value)
    ]
    table = self.continuous_position_bias_mlp(self.relative_coords_table).flatten(0, -2)
    bias = 16 * _gather(self, table).sigmoid()
    # transformers adds the mask twice.
    mask = None if attention_mask is None else 2 * attention_mask
    return (_cosine(qkv, self.logit_scale, bias, mask).transpose(1, 2).flatten(2),)


def _torchvision(self: Any, x: Tensor) -> Tensor:
    """Output of torchvision's `ShiftedWindowAttention` and `ShiftedWindowAttentionV2`: x [B, height, width, C]."""
    if self.training and self.attention_dropout > 0:
        result: Tensor = type(self).forward(self, x)
        return result
    bias = self.get_relative_position_bias()
    height, width = x.shape[1:3]
    rows, columns = self.window_size
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    grid = (x.shape[1], x.shape[2])
    # An axis with one window is not shifted.
    shift = [s if w < n else 0 for s, w, n in zip(self.shift_size, self.window_size, grid, strict=True)]
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    windows = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
    mask = _shift_mask(grid, self.window_size, shift, x) if any(shift) else None
    out = _torchvision_windows(self, windows.flatten(3, 4).flatten(0, 2), bias, mask)
    x = out.view(windows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(shift):
        x = x.roll((shift[0], shift[1]), (1, 2))
    return x[:, :height, :width].contiguous()


def _torchvision_windows(self: Any, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Output of a torchvision block for its windows x [B * windows, K, C]."""
    logit_scale = getattr(self, "logit_scale", None)
    packed = self.qkv.bias
    if logit_scale is not None and packed is not None:
        q_bias, k_bias, v_bias = packed.chunk(3)
        packed = torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))
    q, k, v = _split(self, F.linear(x, self.qkv.weight, packed))
    out = _attend(q, k, v, bias, mask) if logit_scale is None else _cosine((q, k, v), logit_scale, bias, mask)
    projected = F.linear(out.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
    return F.dropout(projected, self.dropout, self.training)


def _shift_mask(grid: tuple[int, int], window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """Mask [windows, K, K] of a shifted grid: -100 between tokens that are no neighbours in the image, else 0."""
    axes = []
    for n, w, s in zip(grid, window, shift, strict=True):
        place = torch.arange(n, device=like.device)
        part = (place >= n - w).long() + (place >= n - s) if s else torch.zeros_like(place)
        axes.append(part.view(-1, w))
    down, across = axes
    # [windows down, windows across, rows, columns]
    part = 3 * down[:, None, :, None] + across[None, :, None, :]
    part = part.flatten(2).flatten(0, 1)
    return -100 * (part[:, :, None] != part[:, None, :]).to(like.dtype)


def _cosine(qkv: Any, logit_scale: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Output [B * windows, H, K, D] of cosine attention: scores are cosines times min(exp(logit_scale), 100)."""
    q, k, v = qkv
    q = F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100)).exp()
    k = F.normalize(k, dim=-1)
    return _attend(q.to(v.dtype), k.to(v.dtype), v, bias, mask, 1.0)


def _split(self: Any, qkv: Tensor) -> Tensor:
    """q, k, v [3, B * windows, H, K, D] of their packed projection."""
    parts: Tensor = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return parts


def _gather(self: Any, table: Tensor) -> Tensor:
    """Relative position bias [1, H, K, K] of a table [places, H]."""
    tokens = self.window_size[0] * self.window_size[1]
    bias: Tensor = table[self.relative_position_index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)[None]
    return bias


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Output [B * windows, H, K, D] of SDPA with the bias [1, H, K, K] and a mask [windows, K, K].

    With a mask, SDPA gets q, k and v as [B, windows, H, K, D], so that the mask broadcasts over the images. Where a
    graph is recorded, SDPA itself is to run, and its fast kernels take 4 dimensions: the mask is copied for each image.
    """
    # [1 or windows, H, K, K]
    both = as_bias(bias if mask is None else bias + mask[:, None], q)
    if mask is None or both is None:
        return F.scaled_dot_product_attention(q, k, v, both, scale=scale)
    windows = len(mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, both)):
        return F.scaled_dot_product_attention(q, k, v, both.repeat(len(q) // windows, 1, 1, 1), scale=scale)
    q, k, v = (t.unflatten(0, (-1, windows)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, both, scale=scale).flatten(0, 1)


def _has_own(self: Any) -> bool:
    """True if only the class's own forward computes the block: active dropout, or another softmax."""
    softmax = getattr(self, "softmax", None)
    return drops(self.attn_drop) or not (softmax is None or (type(softmax) is nn.Softmax and softmax.dim == -1))


_MASKED = (("x", "mask"),)
BLOCKS = (
    Known("WindowAttention", _MASKED, _V1, _LAYOUT, _v1, operators={"@": 2, "*": 3, "+": 2}),
    Known("WindowAttention", _MASKED, _V2, _LAYOUT, _v2, operators={"@": 2, "*": 4, "+": 2}),
    Known("WindowAttention", _MASKED, _V2 | {"k_bias", "qkv_bias_separate"}, _LAYOUT, _v2_timm,
          operators={"@": 2, "*": 4, "+": 2, "+=": 1}),
    Known("WindowMultiHeadAttention", _MASKED, _CR, _LAYOUT, _cr, operators={"@": 2, "*": 1, "+": 2}),
    Known("Swinv2SelfAttention", (("hidden_states", "attention_mask", "output_attentions"),), _SWINV2, _LAYOUT, _swinv2,
          operators={"@": 1, "*": 4, "+": 4}),
    Known("ShiftedWindowAttention", (("x",),), _TORCHVISION, _LAYOUT, _torchvision, operators={}, test=_is_shifted),
    Known("ShiftedWindowAttentionV2", (("x",),), _TORCHVISION | {"logit_scale"}, _LAYOUT, _torchvision, operators={},
          test=_is_shifted),
)  # fmt: skip
