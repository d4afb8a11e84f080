"""Adapter for Hugging Face transformers: each configuration names the attention function that its modules look up.

During a capture, a configuration that names "eager" names `AS_EAGER` instead: SDPA with the masks and the arithmetic of
eager attention. Masks do not change, and other threads that run the model get the same results. This is done only for
models that transformers declares to support SDPA. Functions that a user registered are not replaced.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnx.trace.adapters.masks import as_bias
from attnx.trace.adapters.switches import Instead
from attnx.trace.structure import Structure, structure_of

AS_EAGER = "attnx_as_eager"
BEYOND_SDPA = ("softcap", "s_aux", "sinks")
"""Keyword arguments of transformers' attention functions that SDPA does not support."""

_BEYOND = ("softcap", "sinks")  # parts of attribute names
_SUPPORT: dict[tuple[str, str], bool] = {}  # {(source file, configuration): supports SDPA}


def use_sdpa(structure: Structure) -> list[Callable[[], None]]:
    """Switch configurations from "eager" to SDPA if outputs do not change; returns functions that switch them back."""
    if "transformers" not in sys.modules:
        return []
    undo: list[Callable[[], None]] = []
    for config, modules in configurations(structure):
        if config._attn_implementation_internal == "eager" and _eager_reason(modules) is None:
            _register()
            # The public setter would also set the configurations inside this one.
            ours = config._attn_implementation_internal = Instead(AS_EAGER, "eager")
            undo.append(partial(_switch_back, config, ours))
    return undo


def as_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Output of transformers' eager attention [B, M, H, Dv], computed by SDPA; all masks are added to the scores.

    Raises:
        NotImplementedError: the module passes an argument that SDPA does not support.
    """
    unsupported = [name for name in BEYOND_SDPA if others.get(name) is not None]
    if unsupported:
        names = ", ".join(unsupported)
        raise NotImplementedError(f"{type(module).__name__} uses {names}, which SDPA does not compute")
    terms = [term[..., : key.shape[2]] for term in (attention_mask, position_bias) if term is not None]
    bias = None if not terms else as_bias(sum(terms[1:], start=terms[0]), query)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def not_switched(model: nn.Module) -> dict[str, str]:
    """{module name: reason} of the modules whose configuration was not switched to SDPA."""
    if "transformers" not in sys.modules:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    reasons = {}
    for config, modules in configurations(structure_of(model)):
        kind = config._attn_implementation_internal
        if kind == AS_EAGER:
            continue
        if kind == "eager":
            reason = _eager_reason(modules)
            if reason and any(names_beyond_sdpa(inside) for module in modules for inside in module.modules()):
                reason += "; attnx.huggingface.use(model) switches it to attnx, which computes soft capping and sinks"
        elif kind != "sdpa":
            reason = (
                f"its attention function is {str(kind)!r}; model.set_attn_implementation('sdpa') switches it to SDPA"
            )
        else:
            reason = None
        if reason is not None:
            reasons[names[id(modules[0])]] = reason
    return reasons


def unpacked(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """q [B, H, 1, D] and its mask, if transformers packed grouped heads into the query dimension; else None.

    In a decode step with a mask, transformers' `pack_gqa` passes q [B, Hk, H / Hk, D] to SDPA, whose rows are heads.
    """
    # vars() instead of getattr: a failed lookup by nn.Module.__getattr__ takes microseconds.
    groups = vars(module).get("num_key_value_groups", 1)
    if not isinstance(groups, int) or groups < 2 or q.shape[2] != groups or q.shape[1] != k.shape[1]:
        return None
    config = getattr(module, "config", None)
    if q.shape[1] * groups not in (getattr(config, "num_attention_heads", None), getattr(module, "num_heads", None)):
        return None
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.reshape(len(mask), -1, 1, mask.shape[-1])
    return q.reshape(len(q), -1, 1, q.shape[-1]), mask


def supports_sdpa(module: nn.Module) -> bool | None:
    """True if transformers declares that the module's model supports SDPA; None if it is not a transformers model."""
    if _is_pretrained(module):
        return bool(getattr(type(module), "_supports_sdpa", False))
    config = getattr(module, "config", None)
    return _source_supports_sdpa(type(module).__module__, type(config).__name__)


def uses_beyond_sdpa(module: nn.Module) -> list[str]:
    """Names of the module's attributes for soft capping or sinks, which SDPA does not support."""
    code = _code(module)
    if code is None or not names_beyond_sdpa(module):
        return []
    values = [name for name in code.co_names if any(word in name for word in _BEYOND)]
    return [name for name in values if getattr(module, name, None) is not None]


def names_beyond_sdpa(module: nn.Module) -> bool:
    """True if the module's code passes soft capping or sinks to its attention function, even as None."""
    code = _code(module)
    return code is not None and not _keywords(code).isdisjoint(BEYOND_SDPA)


def looks_up_attention(module: nn.Module) -> bool:
    """True if the module's code looks up its attention function in transformers' table."""
    code = _code(module)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _code(module: nn.Module) -> CodeType | None:
    """Code of the forward of the module's class, without decorators; None if it is not a function."""
    forward = unwrap(getattr(type(module), "forward", nn.Module.forward))
    return forward.__code__ if isinstance(forward, FunctionType) else None


def configurations(structure: Structure) -> Iterator[tuple[Any, list[nn.Module]]]:
    """Each configuration that names an attention function, with the modules that hold it, outermost first."""
    holders: dict[int, tuple[Any, list[nn.Module]]] = {}
    for _, module in structure.where(_has_configuration):
        # vars() instead of getattr: a failed lookup by nn.Module.__getattr__ takes microseconds.
        config: Any = vars(module).get("config", getattr(type(module), "config", None))
        if getattr(config, "_attn_implementation_internal", None) is not None:
            holders.setdefault(id(config), (config, []))[1].append(module)
    yield from holders.values()


def _has_configuration(module: nn.Module) -> bool:
    return "config" in vars(module) or hasattr(type(module), "config")


def _eager_reason(modules: list[nn.Module]) -> str | None:
    """Reason that modules with a common configuration keep their own attention; None if SDPA computes the same."""
    import transformers

    if "eager" in transformers.AttentionInterface():
        return "its attention function was registered as 'eager'"
    if getattr(getattr(modules[0], "config", None), "output_attentions", False) is True:
        return "its configuration sets output_attentions"
    owners = [module for module in modules if _is_pretrained(module)] or modules[:1]
    for owner in owners:
        if not supports_sdpa(owner):
            return f"transformers has no SDPA for {type(owner).__name__}: it computes its softmax itself"
    for module in modules:
        used = uses_beyond_sdpa(module)
        if used:
            return f"{type(module).__name__} uses {', '.join(used)}, which SDPA does not compute"
    return None


def _is_pretrained(module: nn.Module) -> bool:
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _register() -> None:
    """Register `as_eager` with transformers, with the masks of eager attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if AS_EAGER not in AttentionInterface():
        AttentionMaskInterface.register(AS_EAGER, eager_mask)
        AttentionInterface.register(AS_EAGER, as_eager)


def _switch_back(config: Any, ours: Instead) -> None:
    """Undo a switch, unless another implementation was set since."""
    if config._attn_implementation_internal is ours:
        config._attn_implementation_internal = ours.before


def _source_supports_sdpa(source: str, config: str) -> bool | None:
    """SDPA support of a module inside a model, from the models in the same file or package with its configuration."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers is None or (source, config) in _SUPPORT:
        return _SUPPORT.get((source, config))
    package = source.rpartition(".")[0] + "."
    for files in ([source], [name for name in list(sys.modules) if name.startswith(package)]):
        models: list[Any] = [
            kind
            for file in files
            for kind in vars(sys.modules[file]).values()
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.__module__ == file
        ]
        own = [m for m in models if getattr(getattr(m, "config_class", None), "__name__", None) == config]
        if models:
            _SUPPORT[source, config] = all(kind._supports_sdpa for kind in own or models)
            break
    return _SUPPORT.get((source, config))


@cache
def _keywords(code: CodeType) -> frozenset[str]:
    """Names of the keyword arguments in the calls inside a function."""
    constants = [names for names in code.co_consts if isinstance(names, tuple)]
    return frozenset(name for names in constants for name in names if isinstance(name, str))
