"""Hugging Face transformers: each configuration names the attention function that its modules look up.

Where it names "eager", a capture has it name `AS_EAGER`: SDPA with the masks and the arithmetic of eager attention. So
masks stay what they were, and whoever runs the model in another thread meanwhile gets the same numbers. Only where
transformers says that the model's attention is SDPA's; a function that a user has registered is left alone.
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

AS_EAGER = "attnx_as_eager"
BEYOND_SDPA = ("softcap", "s_aux", "sinks")
"""Keyword arguments of transformers' attention functions that SDPA has no counterpart for."""

_BEYOND = ("softcap", "sinks")  # in the names of attributes
_SUPPORT: dict[tuple[str, str], bool] = {}  # by source file and configuration


def use_sdpa(model: nn.Module) -> list[Callable[[], None]]:
    """Switches configurations from "eager" to SDPA where the outputs stay; gives functions that switch them back."""
    if "transformers" not in sys.modules:
        return []
    undo: list[Callable[[], None]] = []
    for config, modules in configurations(model):
        if config._attn_implementation_internal == "eager" and _why_eager(modules) is None:
            _register()
            # The public setter would also set every configuration below this one.
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
    """Output of transformers' eager attention, [B, M, H, Dv], by SDPA: every mask is added to the scores.

    Raises:
        NotImplementedError: the module asks for what SDPA does not compute.
    """
    beyond = [name for name in BEYOND_SDPA if others.get(name) is not None]
    if beyond:
        raise NotImplementedError(f"{type(module).__name__} asks for {', '.join(beyond)}, which SDPA does not compute")
    terms = [term[..., : key.shape[2]] for term in (attention_mask, position_bias) if term is not None]
    bias = None if not terms else as_bias(sum(terms[1:], start=terms[0]), query)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def not_switched(model: nn.Module) -> dict[str, str]:
    """{module name: why it keeps another attention function than SDPA}, of those whose configuration was left alone."""
    if "transformers" not in sys.modules:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    reasons = {}
    for config, modules in configurations(model):
        kind = config._attn_implementation_internal
        if kind == AS_EAGER:
            continue
        if kind == "eager":
            why = _why_eager(modules)
            if why and any(names_beyond_sdpa(inside) for module in modules for inside in module.modules()):
                why += "; attnx.huggingface.use(model) makes it attend by attnx, which computes soft capping and sinks"
        elif kind != "sdpa":
            why = f"its attention function is {str(kind)!r}; model.set_attn_implementation('sdpa') makes it SDPA"
        else:
            why = None
        if why is not None:
            reasons[names[id(modules[0])]] = why
    return reasons


def unpacked(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """q [B, H, 1, D] and its mask, where transformers has packed grouped heads into the dimension of the queries.

    In a decode step with a mask its `pack_gqa` hands SDPA q [B, Hk, H / Hk, D]: rows that are heads. None where q is
    not packed.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if not isinstance(groups, int) or groups < 2 or q.shape[2] != groups or q.shape[1] != k.shape[1]:
        return None
    config = getattr(module, "config", None)
    if q.shape[1] * groups not in (getattr(config, "num_attention_heads", None), getattr(module, "num_heads", None)):
        return None
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.reshape(len(mask), -1, 1, mask.shape[-1])
    return q.reshape(len(q), -1, 1, q.shape[-1]), mask


def supports_sdpa(module: nn.Module) -> bool | None:
    """True if transformers says that the module's model can attend by SDPA; None if it is of no model of theirs."""
    if _is_pretrained(module):
        return bool(getattr(type(module), "_supports_sdpa", False))
    config = getattr(module, "config", None)
    return _source_supports_sdpa(type(module).__module__, type(config).__name__)


def asks_beyond_sdpa(module: nn.Module) -> list[str]:
    """Names of what the module asks of its attention function and SDPA can't give: soft capping, sinks."""
    code = _code(module)
    if code is None or not names_beyond_sdpa(module):
        return []
    values = [name for name in code.co_names if any(word in name for word in _BEYOND)]
    return [name for name in values if getattr(module, name, None) is not None]


def names_beyond_sdpa(module: nn.Module) -> bool:
    """True if the module's code hands its attention function soft capping or sinks, be they None."""
    code = _code(module)
    return code is not None and not _keywords(code).isdisjoint(BEYOND_SDPA)


def asks_its_table(module: nn.Module) -> bool:
    """True if the module's code looks its attention function up in transformers' table."""
    code = _code(module)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _code(module: nn.Module) -> CodeType | None:
    """The code of the module's class's forward, whatever decorators are around it; None if it is no function."""
    forward = unwrap(getattr(type(module), "forward", nn.Module.forward))
    return forward.__code__ if isinstance(forward, FunctionType) else None


def configurations(model: nn.Module) -> Iterator[tuple[Any, list[nn.Module]]]:
    """Each configuration that names an attention function, and the modules that hold it, outermost first."""
    holders: dict[int, tuple[Any, list[nn.Module]]] = {}
    for module in model.modules():
        # Not by getattr: nn.Module's takes microseconds to find that there is none.
        config: Any = vars(module).get("config", getattr(type(module), "config", None))
        if getattr(config, "_attn_implementation_internal", None) is not None:
            holders.setdefault(id(config), (config, []))[1].append(module)
    yield from holders.values()


def _why_eager(modules: list[nn.Module]) -> str | None:
    """Reason that modules which share a configuration keep their own attention; None where SDPA computes the same."""
    import transformers

    if "eager" in transformers.AttentionInterface():
        return "its attention function is one that was registered as 'eager'"
    if getattr(getattr(modules[0], "config", None), "output_attentions", False) is True:
        return "its configuration asks for output_attentions"
    owners = [module for module in modules if _is_pretrained(module)] or modules[:1]
    for owner in owners:
        if not supports_sdpa(owner):
            return f"transformers has no SDPA for {type(owner).__name__}: it computes its softmax itself"
    for module in modules:
        asked = asks_beyond_sdpa(module)
        if asked:
            return f"{type(module).__name__} asks for {', '.join(asked)}, which SDPA does not compute"
    return None


def _is_pretrained(module: nn.Module) -> bool:
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _register() -> None:
    """Gives transformers `as_eager`, and eager attention's masks for it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    if AS_EAGER not in AttentionInterface():
        AttentionMaskInterface.register(AS_EAGER, eager_mask)
        AttentionInterface.register(AS_EAGER, as_eager)


def _switch_back(config: Any, ours: Instead) -> None:
    """Undoes a switch, unless somebody has set another implementation since."""
    if config._attn_implementation_internal is ours:
        config._attn_implementation_internal = ours.before


def _source_supports_sdpa(source: str, config: str) -> bool | None:
    """Of a module that is no model itself: what the models of the same file, or package, and configuration say."""
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
    """Names of the keyword arguments in the calls that a function makes."""
    constants = [names for names in code.co_consts if isinstance(names, tuple)]
    return frozenset(name for names in constants for name in names if isinstance(name, str))
