"""Hugging Face transformers: each configuration names the attention function that its modules look up.

A model's masks are made for that function, so it is switched only where transformers says that SDPA is the same
arithmetic, and only from "eager": a function that a user has registered is left alone.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from attnx.adapters.switches import Instead

BEYOND_SDPA = ("softcap", "s_aux", "sinks")
"""What modules hand to their attention function by name, and `F.scaled_dot_product_attention` can't be told."""

_TABLE = "ALL_ATTENTION_FUNCTIONS"


def use_sdpa(model: nn.Module) -> list[Callable[[], None]]:
    """Switches configurations from "eager" to "sdpa" where the outputs stay; gives functions that switch them back."""
    if "transformers" not in sys.modules:
        return []
    undo: list[Callable[[], None]] = []
    for config, modules in _configurations(model):
        before = config._attn_implementation_internal
        if before == "eager" and _why_eager(modules) is None:
            # The public setter would also set every configuration below this one.
            config._attn_implementation_internal = Instead("sdpa", before)
            undo.append(partial(setattr, config, "_attn_implementation_internal", before))
    return undo


def not_switched(model: nn.Module) -> dict[str, str]:
    """{module name: why it keeps another attention function than SDPA}, of those whose configuration was left alone."""
    if "transformers" not in sys.modules:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    reasons = {}
    for config, modules in _configurations(model):
        kind = config._attn_implementation_internal
        if kind == "eager":
            why = _why_eager(modules)
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


def supports_sdpa(module: nn.Module) -> bool:
    """Whether transformers says that the model which the module belongs to computes the same with SDPA's masks."""
    if _is_pretrained(module):
        return bool(getattr(type(module), "_supports_sdpa", False))
    config = getattr(module, "config", None)
    return _file_supports_sdpa(type(module).__module__, type(config).__name__)


def asks_beyond_sdpa(module: nn.Module) -> list[str]:
    """Names of what the module asks of its attention function and SDPA can't give: soft capping, sinks."""
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, FunctionType) or not any(name in _keywords(forward) for name in BEYOND_SDPA):
        return []
    values = [name for name in forward.__code__.co_names if any(word in name for word in ("softcap", "sinks"))]
    return [name for name in values if getattr(module, name, None) is not None]


def _configurations(model: nn.Module) -> Iterator[tuple[Any, list[nn.Module]]]:
    """Each configuration that names an attention function, and the modules that hold it, outermost first."""
    holders: dict[int, tuple[Any, list[nn.Module]]] = {}
    for module in model.modules():
        # Not by getattr: nn.Module's takes microseconds to find that there is none.
        config: Any = vars(module).get("config", getattr(type(module), "config", None))
        if getattr(config, "_attn_implementation_internal", None) is not None:
            holders.setdefault(id(config), (config, []))[1].append(module)
    yield from holders.values()


def _why_eager(modules: list[nn.Module]) -> str | None:
    """Why modules that share a configuration keep their own attention; None where SDPA computes the same."""
    import transformers

    if "eager" in transformers.AttentionInterface():
        return "its attention function is one that was registered as 'eager'"
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


@cache
def _file_supports_sdpa(file: str, config: str) -> bool:
    """Of a module that is no model itself: what the models of the same source file and configuration say."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    names = vars(sys.modules[file]).values() if transformers is not None and file in sys.modules else ()
    models: list[Any] = [
        kind
        for kind in names
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.__module__ == file
    ]
    own = [kind for kind in models if getattr(getattr(kind, "config_class", None), "__name__", None) == config]
    return bool(models) and all(kind._supports_sdpa for kind in own or models)


@cache
def _keywords(function: FunctionType) -> frozenset[str]:
    """Names of the keyword arguments in the calls that a function makes."""
    constants = function.__code__.co_consts
    return frozenset(name for names in constants if isinstance(names, tuple) for name in names if isinstance(name, str))
