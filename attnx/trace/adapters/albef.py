"""Adapter for ALBEF's own attention: forwards that call SDPA instead of computing the softmax themselves.

BLIP's and LAVIS's copies of these blocks are supported, too. See `known` for how blocks are recognised.

The forward is bound to the instance. For what SDPA does not compute it calls the class's own forward, whose softmax is
then the map: active dropout, a head mask, relative positions, and probabilities that are returned while gradients are
enabled, because their graph may be needed.

`save_attention` and `register_hook` still store the probabilities, without a graph, and their gradient, which is
dP = dO V^T. The original code raises an error if nothing requires a gradient; here the probabilities are stored in that
case, and the stored gradients do not change.

Reference:
    https://github.com/salesforce/ALBEF, models/xbert.py and models/vit.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.trace.adapters.known import Known
from attnx.trace.adapters.masks import as_bias
from attnx.trace.adapters.rewriting import (
    VIT_MAY_USE,
    VIT_NEEDS,
    drops,
    makes_graph,
    output,
    probabilities_of,
    project,
    returns_one,
)

_BERT = ("hidden_states", "attention_mask", "head_mask", "encoder_hidden_states", "encoder_attention_mask",
         "past_key_value", "output_attentions")  # fmt: skip
# Names that the forward uses. A similar block with a norm, a table of positions or a gate uses more.
_BERT_NEEDS = {"query", "key", "value", "transpose_for_scores", "dropout", "save_attention", "save_attention_map",
               "save_attn_gradients", "register_hook", "Softmax"}  # fmt: skip
_BERT_MAY_USE = {
    "all_head_size", "arange", "attention_head_size", "cat", "contiguous", "device", "distance_embedding", "dtype",
    "einsum", "long", "math", "matmul", "max_position_embeddings", "nn", "permute", "position_embedding_type", "size",
    "sqrt", "to", "torch", "transpose", "view",
}  # fmt: skip
_VIT_SAVES = {"save_attention_map", "save_attn_gradients", "register_hook"}


def _bert(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_value: tuple[Tensor, ...] | None = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """xbert's self- and cross-attention: (context, probabilities if output_attentions, (key, value))."""
    inputs = (hidden_states, encoder_hidden_states, attention_mask, encoder_attention_mask, *(past_key_value or ()))
    if (
        head_mask is not None
        or str(self.position_embedding_type).startswith("relative_key")
        or drops(self.dropout)
        or (output_attentions and makes_graph(self, *inputs))
    ):
        result: tuple[Any, ...] = type(self).forward(
            self, hidden_states, attention_mask, head_mask, encoder_hidden_states, encoder_attention_mask,
            past_key_value, output_attentions,
        )  # fmt: skip
        return result
    q = self.transpose_for_scores(self.query(hidden_states))
    crosses = encoder_hidden_states is not None
    source, mask = (encoder_hidden_states, encoder_attention_mask) if crosses else (hidden_states, attention_mask)
    k, v = self.transpose_for_scores(self.key(source)), self.transpose_for_scores(self.value(source))
    if past_key_value is not None and not crosses:
        k, v = torch.cat((past_key_value[0], k), 2), torch.cat((past_key_value[1], v), 2)
    size = self.attention_head_size
    out = F.scaled_dot_product_attention(q, k, v, as_bias(mask, q), scale=size**-0.5)
    probabilities = None
    saves = crosses and self.save_attention
    if saves or output_attentions:
        with torch.no_grad():
            scores = q @ k.transpose(-1, -2) / size**0.5
            probabilities = (scores if mask is None else scores + mask).softmax(-1)
    if saves:
        _save(self, probabilities, out, v)
    context = out.transpose(1, 2).flatten(2)
    return (context, probabilities, (k, v)) if output_attentions else (context, (k, v))


def _vit(self: Any, x: Tensor, register_hook: bool = False) -> Tensor:
    """Output of ALBEF's attention in its vision transformer."""
    if drops(self.attn_drop):
        result: Tensor = type(self).forward(self, x, register_hook)
        return result
    q, k, v = project(self, x)
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    if register_hook:
        _save(self, probabilities_of(self, q, k), out, v)
    return output(self, out)


def _save(self: Any, probabilities: Any, out: Tensor, v: Tensor) -> None:
    """Store the probabilities in the module, and their gradient in the backward pass."""

    def weigh(grad: Tensor) -> None:
        self.save_attn_gradients((grad @ v.transpose(-1, -2)).to(probabilities.dtype))

    self.save_attention_map(probabilities)
    if out.requires_grad:
        out.register_hook(weigh)


BLOCKS = (
    Known("BertSelfAttention", (_BERT,), _BERT_NEEDS, _BERT_MAY_USE, _bert),
    Known("Attention", (("x", "register_hook"),), VIT_NEEDS | _VIT_SAVES, VIT_MAY_USE, _vit, test=returns_one),
)
