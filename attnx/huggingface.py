"""attnx as an attention implementation of Hugging Face transformers: `attnx.huggingface.use(model)`."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnx.ops.functional import attention
from attnx.trace.adapters.huggingface import configurations, looks_up_attention, names_beyond_sdpa, supports_sdpa
from attnx.trace.layers import attention_layers
from attnx.trace.structure import structure_of

# Arguments that transformers passes to attention functions and that do not change the arithmetic of SDPA: they are
# contained in the masks, or they select what else is returned.
_HARMLESS = frozenset(
    (
        "cache", "cache_position", "deterministic", "labels", "logits_to_keep", "num_items_in_batch",
        "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
        "position_ids", "return_dict", "sliding_window", "use_cache",
    )
)  # fmt: skip


def use(model: nn.Module, heads: str = "mean", backend: str = "auto") -> None:
    """Switch a transformers model to attnx attention: with `output_attentions=True` it returns head-reduced maps.

    Registers the attention implementation, sets it, and checks that every submodel uses it. Undo it with
    `model.set_attn_implementation("sdpa")`. Soft-capped scores (Gemma 2) and attention sinks (GPT-OSS) are supported,
    which SDPA cannot compute, so `attnx.capture` can capture such models after this call.

    Args:
        model: a `transformers.PreTrainedModel`.
        heads, backend: as in `attnx.attention`.

    Raises:
        ValueError: the model is not a transformers model, or unknown heads or backend.
        NotImplementedError: transformers has no SDPA for a submodel, whose masks would differ; lists the submodels.
        RuntimeError: a submodel kept its attention implementation; lists them. The model is restored.

    Warns:
        UserWarning: attention modules compute their softmax themselves, independent of the implementation.

    Reference:
        https://huggingface.co/docs/transformers/attention_interface

    Example:
        >>> import torch, transformers, attnx.huggingface
        >>> config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32)
        >>> model = transformers.ViTModel(config).eval()
        >>> attnx.huggingface.use(model)
        >>> [list(a.shape) for a in model(torch.zeros(1, 3, 32, 32), output_attentions=True).attentions]
        [[1, 5, 5], [1, 5, 5]]
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a transformers.PreTrainedModel; got {type(model).__name__}")
    models: dict[str, Any] = {n: module for n, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    submodels = _with_attention(models)
    unsupported = [_label(name, module) for name, module in submodels.items() if not _is_supported(module)]
    if unsupported:
        raise NotImplementedError(
            f"transformers has no SDPA for {', '.join(unsupported)}: their masks and arithmetic differ; use attnx on a "
            "submodel with SDPA"
        )
    name = f"attnx_{heads}_{backend}"
    register(name, heads, backend)
    before = [(config, config._attn_implementation_internal) for config, _ in configurations(structure_of(model))]
    model.set_attn_implementation(name)
    left = [
        f"{_label(where, module)} keeps {module.config._attn_implementation!r}"
        for where, module in submodels.items()
        if module.config._attn_implementation != name
    ]
    if left:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        raise RuntimeError(f"not every submodel took the attention implementation {name!r}: {', '.join(left)}")
    own = [layer for layer in attention_layers(model) if not looks_up_attention(model.get_submodule(layer))]
    if own:
        warnings.warn(f"attnx: attention modules that keep their own softmax: {', '.join(own)}", stacklevel=2)


def register(name: str = "attnx", heads: str = "mean", backend: str = "auto") -> None:
    """Register attnx as an attention implementation of transformers, for `model.set_attn_implementation("attnx")`.

    With `output_attentions=True` the model's `attentions` are head-reduced maps, [B, M, N] float32 each, and no
    [B, H, M, N] is allocated. Padding and causal masks are those of SDPA. `use` calls this function, sets the
    implementation and checks it.

    Args:
        name: name of the implementation. Different names can have different settings.
        heads, backend: as in `attnx.attention`.

    Raises:
        ValueError: unknown heads or backend.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from attnx.ops.checks import check_backend
    from attnx.ops.reducers import Reduction

    Reduction.parse(heads), check_backend(backend)
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
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    heads: str,
    backend: str,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention function for transformers: q [B,H,M,D], k, v [B,Hk,N,D] -> output [B,M,H,Dv] and the map.

    Raises:
        ValueError: active dropout.
        NotImplementedError: an unknown argument, or a model for which transformers has no SDPA.
    """
    kind = type(module).__name__
    if dropout:
        raise ValueError(f"attention dropout: expected 0; got {dropout}; call model.eval()")
    unknown = [name for name, value in others.items() if value is not None and name not in _HARMLESS]
    if unknown:
        raise NotImplementedError(f"{kind} passes {', '.join(unknown)} to its attention, which attnx does not compute")
    if supports_sdpa(module) is False and not names_beyond_sdpa(module):
        raise NotImplementedError(f"transformers has no SDPA for the model of {kind}; set_attn_implementation('eager')")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    out, amap = attention(
        query,
        key,
        value,
        bias=_bias(attention_mask, position_bias, key.shape[2]),
        is_causal=causal,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        heads=heads,
        backend=backend,
    )
    return out.transpose(1, 2), amap


def _bias(mask: Tensor | None, position_bias: Tensor | None, keys: int) -> Tensor | None:
    """The sum of a mask and a position bias."""
    if position_bias is None:
        return mask
    position_bias = position_bias[..., :keys]
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, -torch.inf)
    return position_bias + mask


def _with_attention(models: dict[str, Any]) -> dict[str, Any]:
    """The models among a model and its submodels that contain attention layers outside of their submodels."""
    whole = models[""]
    inside = [
        max((name for name in models if not name or layer.startswith(name + ".")), key=len)
        for layer in attention_layers(whole)
    ]
    return {name: model for name, model in models.items() if name in inside}


def _is_supported(model: nn.Module) -> bool:
    """True if attnx can compute a submodel's attention."""
    return bool(supports_sdpa(model)) or any(names_beyond_sdpa(module) for module in model.modules())


def _label(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__
