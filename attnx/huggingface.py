"""attnx as an attention implementation of Hugging Face transformers: `model.set_attn_implementation("attnx")`."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from attnx.ops import attention


def register(name: str = "attnx", heads: str = "mean", backend: str = "auto") -> None:
    """Registers attnx as an attention implementation of transformers, for `model.set_attn_implementation("attnx")`.

    With `output_attentions=True` the model's `attentions` are then the head-reduced maps, [B, M, N] float32 each, and
    no [B, H, M, N] is made. Padding and causal masks are SDPA's own.

    Args:
        name: what to register under; two names can carry two settings.
        heads, backend: as in `attnx.attention`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, partial(_attention, heads=heads, backend=backend))
    # Without a mask function of the same name the model would attend to its padding.
    AttentionMaskInterface.register(name, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    heads: str,
    backend: str,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What transformers calls: q [B,H,M,D], k, v [B,Hk,N,D] -> output [B,M,H,Dv] and the map."""
    if dropout:
        raise ValueError(f"attention dropout: expected 0; got {dropout}; call model.eval()")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    out, amap = attention(
        query, key, value, bias=attention_mask, is_causal=causal, scale=scaling, heads=heads, backend=backend
    )
    return out.transpose(1, 2), amap
