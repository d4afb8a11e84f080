"""Adapter for BLIP's attention in Hugging Face transformers: forwards that call SDPA.

The classes compute their softmax themselves and always return (output, probabilities). As with transformers' own SDPA,
None is returned in place of the probabilities. The class's own forward runs if something reads them
(output_attentions=True, or a forward hook of another package), and with active dropout; the map is then its softmax.

Reference:
    https://github.com/huggingface/transformers, models/blip/modeling_blip.py and models/blip/modeling_blip_text.py
"""

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry

from attnx.trace.adapters.bert_like import split_heads
from attnx.trace.adapters.known import Known, arguments_of
from attnx.trace.adapters.masks import as_bias
from attnx.trace.adapters.rewriting import drops

_COLLECTING = "transformers.utils.output_capturing"  # the module of the hooks for output_attentions=True


def _image(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Output [B, N, C] of the attention of BLIP's image encoder, and None."""
    given = arguments_of(self, args, kwargs)
    if drops(self.dropout) or _is_read(self, given):
        result: tuple[Tensor, Tensor] = type(self).forward(self, *args, **kwargs)
        return result
    q, k, v = self.qkv(given["hidden_states"]).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return self.projection(out.transpose(1, 2).flatten(2)), None


def _text(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Context [B, M, C] of the self- or cross-attention of BLIP's text model, and None."""
    given = arguments_of(self, args, kwargs)
    if drops(self.dropout) or _is_read(self, given):
        result: tuple[Tensor, Tensor] = type(self).forward(self, *args, **kwargs)
        return result
    size = self.attention_head_size
    q = split_heads(self.query(given["hidden_states"]), size)
    crosses = given.get("encoder_hidden_states") is not None
    source = given["encoder_hidden_states" if crosses else "hidden_states"]
    mask = given.get("encoder_attention_mask" if crosses else "attention_mask")
    k, v = _keys_and_values(self, source, crosses, given.get("cache", given.get("past_key_values")))
    bias = None if mask is None else as_bias(mask.to(q.device), q)
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=size**-0.5)
    return out.transpose(1, 2).flatten(2), None


def _keys_and_values(self: Any, source: Tensor, crosses: bool, cache: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, N, D] of the source and of earlier steps; the cache, if any, is updated.

    Args:
        self: the attention.
        source: [B, N, C], the tokens that are attended to.
        crosses: the source is the image, whose keys and values are cached in the first step only.
        cache: transformers' Cache, its EncoderDecoderCache, or None.
    """
    own = cache
    has_both = hasattr(cache, "cross_attention_cache")
    if has_both:
        own = cache.cross_attention_cache if crosses else cache.self_attention_cache
    if crosses and has_both and cache.is_updated.get(self.layer_idx):
        layer = own.layers[self.layer_idx]
        return layer.keys, layer.values
    size = self.attention_head_size
    k, v = split_heads(self.key(source), size), split_heads(self.value(source), size)
    if own is not None:
        k, v = own.update(k, v, self.layer_idx)
    if crosses and has_both:
        cache.is_updated[self.layer_idx] = True
    return k, v


def _is_read(module: nn.Module, given: dict[str, Any]) -> bool:
    """True if the probabilities were asked for, or a hook of another package sees them."""
    hooks = (*module._forward_hooks.values(), *registry._global_forward_hooks.values())
    return bool(given.get("output_attentions")) or any(_reads(hook) for hook in hooks)


def _reads(hook: Any) -> bool:
    """True if a forward hook may read the probabilities; hooks of this package do not."""
    source = str(getattr(hook, "__module__", ""))
    if source == _COLLECTING:
        # Once output_attentions=True was given, these hooks stay on the model and do nothing in other calls.
        collected = sys.modules[_COLLECTING]._active_collector.get()
        return any("attentions" in name for name in collected or ())
    return not source.startswith("attnx.")


_TEXT_ARGUMENTS = ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask")
BLOCKS = (
    Known(
        "BlipAttention",
        (("hidden_states", "kwargs"),),
        {"qkv", "num_heads", "scale", "softmax", "dropout", "projection", "embed_dim"},
        {"functional", "matmul", "nn", "permute", "reshape", "size", "torch", "transpose"},
        _image,
        "transformers.models.blip.",
    ),
    Known(
        "BlipTextSelfAttention",
        tuple((*_TEXT_ARGUMENTS, cache, "kwargs") for cache in ("cache", "past_key_values")),
        {
            "query", "key", "value", "attention_head_size", "dropout", "Softmax", "sqrt", "layer_idx", "is_updated",
            "EncoderDecoderCache", "cross_attention_cache", "self_attention_cache", "update",
        },
        {
            "all_head_size", "contiguous", "device", "get", "isinstance", "keys", "layers", "math", "matmul", "nn",
            "permute", "shape", "size", "to", "torch", "transpose", "values", "view",
        },
        _text,
        "transformers.models.blip.",
    ),
)  # fmt: skip
