"""Adapter for the attention of ViLT, VisualBERT, LXMERT, FLAVA and TimeSformer in Hugging Face transformers.

These classes compute softmax(Q K^T / sqrt(d) + mask) V themselves, and return (context,) or (context, probabilities).
With active dropout, and if the probabilities are returned, the class's own forward runs; the map is then its softmax.

Reference:
    https://github.com/huggingface/transformers, models/vilt/modeling_vilt.py, models/lxmert/modeling_lxmert.py and
    models/timesformer/modeling_timesformer.py
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnx.trace.adapters.known import Known, arguments_of
from attnx.trace.adapters.masks import as_bias
from attnx.trace.adapters.rewriting import drops


def split_heads(x: Tensor, size: int) -> Tensor:
    """[B, H, N, size] of projected tokens [B, N, H * size]."""
    heads: Tensor = x.unflatten(-1, (-1, size)).transpose(1, 2)
    return heads


def _separate(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The context [B, M, H * D] of an attention with a projection each of queries, keys and values."""
    given = arguments_of(self, args, kwargs)
    if drops(self.dropout) or given.get("output_attentions"):
        result: tuple[Tensor, ...] = type(self).forward(self, *args, **kwargs)
        return result
    x, size = given["hidden_states"], self.attention_head_size
    source = given.get("context", x)
    q, k, v = (split_heads(t, size) for t in (self.query(x), self.key(source), self.value(source)))
    out = F.scaled_dot_product_attention(q, k, v, as_bias(given.get("attention_mask"), q), scale=size**-0.5)
    return (out.transpose(1, 2).flatten(2),)


def _packed(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The context [B, N, H * D] of TimeSformer's attention, which has one projection of queries, keys and values."""
    given = arguments_of(self, args, kwargs)
    if drops(self.attn_drop) or given.get("output_attentions"):
        result: tuple[Tensor, ...] = type(self).forward(self, *args, **kwargs)
        return result
    q, k, v = self.qkv(given["hidden_states"]).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return (out.transpose(1, 2).flatten(2),)


_NEEDS = {"query", "key", "value", "attention_head_size", "dropout", "matmul", "sqrt"}
_MAY_USE = {
    "Softmax", "all_head_size", "contiguous", "functional", "head_size", "math", "nn", "permute", "shape", "size",
    "softmax", "torch", "transpose", "view",
}  # fmt: skip
_ONE = (("hidden_states", "attention_mask", "output_attentions"),)
_TWO = (("hidden_states", "context", "attention_mask", "output_attentions"),)
BLOCKS = (
    Known("ViltSelfAttention", _ONE, _NEEDS, _MAY_USE, _separate, "transformers.models.vilt."),
    Known("VisualBertSelfAttention", _ONE, _NEEDS, _MAY_USE, _separate, "transformers.models.visual_bert."),
    Known("FlavaSelfAttention", _ONE, _NEEDS, _MAY_USE, _separate, "transformers.models.flava."),
    Known("LxmertAttention", _TWO, _NEEDS, _MAY_USE, _separate, "transformers.models.lxmert."),
    Known(
        "TimesformerSelfAttention", (("hidden_states", "output_attentions"),),
        {"qkv", "num_heads", "scale", "softmax", "attn_drop"}, {"permute", "reshape", "shape", "transpose"}, _packed,
        "transformers.models.timesformer.",
    ),
)  # fmt: skip
