"""ALBEF's and DINO's own code, whose attention writes its softmax out: forwards that end in SDPA instead.

A block is known by its class's name and by what its `forward` takes and uses; no foreign code is imported. What uses
more, or less, is another block, and is left alone: timm's and transformers' of the same names among them. BLIP's and
LAVIS's copies of these blocks are the same.

A forward is bound to the instance, and hands what it can't say in SDPA's words to the class's own forward, which nobody
hears: dropout that is active, a head mask, relative positions, and probabilities that are returned while gradients are
on, since their graph may be asked for.

What a block keeps for its user it keeps still. `save_attention` and `register_hook` give the probabilities, without
a graph, and their gradient, which is dP = dO V^T of the output's. The originals raise where nothing asks for
gradients; here the map is kept then, and the gradients are left as they were.

Reference:
    https://github.com/salesforce/ALBEF, models/xbert.py and models/vit.py
    https://github.com/facebookresearch/dino, vision_transformer.py
"""

import dis
import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry

from attnx.trace.adapters.masks import as_bias
from attnx.trace.adapters.switches import bind, own_forward_only

_BERT = ("hidden_states", "attention_mask", "head_mask", "encoder_hidden_states", "encoder_attention_mask",
         "past_key_value", "output_attentions")  # fmt: skip
# Attributes and functions that the forwards use; a look-alike with a norm, a table of positions or a gate has more.
_BERT_NEEDS = {"query", "key", "value", "transpose_for_scores", "dropout", "save_attention", "save_attention_map",
               "save_attn_gradients", "register_hook", "Softmax"}  # fmt: skip
_BERT_USES = _BERT_NEEDS | {
    "all_head_size", "arange", "attention_head_size", "cat", "contiguous", "device", "distance_embedding", "dtype",
    "einsum", "long", "math", "matmul", "max_position_embeddings", "nn", "permute", "position_embedding_type", "size",
    "sqrt", "to", "torch", "transpose", "view",
}  # fmt: skip
_VIT_NEEDS = {"qkv", "num_heads", "scale", "softmax", "attn_drop", "proj", "proj_drop"}
_VIT_USES = _VIT_NEEDS | {"permute", "reshape", "shape", "transpose"}
_VIT_SAVES = {"save_attention_map", "save_attn_gradients", "register_hook"}
_BLOCK = {"norm1", "attn", "drop_path", "norm2", "mlp"}


def use_sdpa(model: nn.Module) -> list[Callable[[], None]]:
    """Binds forwards that call SDPA to the blocks of these classes; gives functions that unbind them."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        kind = type(module)
        if kind.__name__ not in ("BertSelfAttention", "Attention", "Block") or not own_forward_only(module):
            continue
        forward = _rewritten(kind.__name__, kind.forward) if isinstance(kind.forward, FunctionType) else None
        if forward is not None and not kind.__module__.startswith(("transformers.", "timm.")):
            undo.append(bind(module, forward))
    return undo


@cache
def _rewritten(name: str, forward: FunctionType) -> Callable[..., Any] | None:
    """The forward to bind in the place of a class's own; None where that is not one that is known."""
    takes = tuple(inspect.signature(forward).parameters)[1:]
    uses = set(forward.__code__.co_names)
    if name == "BertSelfAttention" and takes == _BERT and _BERT_NEEDS <= uses <= _BERT_USES:
        return _bert
    if name == "Attention" and takes == ("x", "register_hook") and uses >= _VIT_NEEDS | _VIT_SAVES:
        return _vit if uses <= _VIT_USES | _VIT_SAVES and not _gives_pair(forward) else None
    if name == "Attention" and takes == ("x",) and _VIT_NEEDS <= uses <= _VIT_USES:
        return _vit_with_probabilities if _gives_pair(forward) else None
    if name == "Block" and takes == ("x", "return_attention") and uses == _BLOCK:
        return _block
    return None


def _gives_pair(function: FunctionType) -> bool:
    """Whether every return is of two things: the output, and the probabilities."""
    steps = list(dis.get_instructions(function))
    made = [steps[i - 1] for i, step in enumerate(steps) if step.opname == "RETURN_VALUE"]
    return bool(made) and all((step.opname, step.arg) == ("BUILD_TUPLE", 2) for step in made)


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
    """xbert's self- and cross-attention: (context, probabilities if they are asked for, (key, value))."""
    given = (hidden_states, encoder_hidden_states, attention_mask, encoder_attention_mask, *(past_key_value or ()))
    if (
        head_mask is not None
        or str(self.position_embedding_type).startswith("relative_key")
        or _drops(self.dropout)
        or (output_attentions and _makes_graph(self, *given))
    ):
        return type(self).forward(
            self, hidden_states, attention_mask, head_mask, encoder_hidden_states, encoder_attention_mask,
            past_key_value, output_attentions,
        )  # fmt: skip
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
    """ALBEF's attention of an image: the output."""
    if _drops(self.attn_drop):
        return type(self).forward(self, x, register_hook)
    q, k, v = _project(self, x)
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    if register_hook:
        _save(self, _softmax(self, q, k), out, v)
    return _leave(self, out)


def _vit_with_probabilities(self: Any, x: Tensor, probabilities: bool = True) -> tuple[Tensor, Tensor | None]:
    """DINO's: the output and the probabilities, None unless they are wanted."""
    if _drops(self.attn_drop) or (probabilities and _makes_graph(self, x)):
        return type(self).forward(self, x)
    q, k, v = _project(self, x)
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return _leave(self, out), _softmax(self, q, k) if probabilities else None


def _block(self: Any, x: Tensor, return_attention: bool = False) -> Tensor:
    """DINO's block, which has its attention make no probabilities that nobody would see."""
    opened = getattr(vars(self.attn).get("forward"), "__func__", None) is _vit_with_probabilities
    if return_attention or not opened or _watched(self.attn):
        return type(self).forward(self, x, return_attention)
    attended, _ = self.attn(self.norm1(x), probabilities=False)
    x = x + self.drop_path(attended)
    return x + self.drop_path(self.mlp(self.norm2(x)))


def _project(self: Any, x: Tensor) -> Any:
    """q, k, v of [B, H, N, D] each, from packed ones."""
    return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


def _leave(self: Any, out: Tensor) -> Tensor:
    return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@torch.no_grad()
def _softmax(self: Any, q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * self.scale).softmax(-1)


def _save(self: Any, probabilities: Any, out: Tensor, v: Tensor) -> None:
    """Gives the module the probabilities, and their gradient when that of SDPA's output comes."""

    def weigh(grad: Tensor) -> None:
        self.save_attn_gradients((grad @ v.transpose(-1, -2)).to(probabilities.dtype))

    self.save_attention_map(probabilities)
    if out.requires_grad:
        out.register_hook(weigh)


def _drops(dropout: Any) -> bool:
    """Whether probabilities do not leave the module as they came."""
    return not isinstance(dropout, nn.Identity) and not (
        isinstance(dropout, nn.Dropout) and (not dropout.training or dropout.p == 0)
    )


def _makes_graph(module: nn.Module, *given: Tensor | None) -> bool:
    """Whether what the module makes of it may be asked for gradients."""
    tensors = (*module.parameters(), *(t for t in given if t is not None))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _watched(module: nn.Module) -> bool:
    """Whether hooks see the module's output: those of this package look at none."""
    hooks = (*module._forward_hooks.values(), *registry._global_forward_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("attnx.") for hook in hooks)
