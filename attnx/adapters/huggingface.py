"""Hugging Face transformers: each configuration names the attention function that its modules look up.

A model's masks are made for that function, so it is switched only where transformers says that SDPA is the same
arithmetic, and only from "eager": a function that a user has registered is left alone.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from attnx.adapters.switches import Instead

BEYOND_SDPA = ("softcap", "s_aux", "sinks")
"""What modules hand to their attention function by name, and `F.scaled_dot_product_attention` can't be told."""

_BEYOND = ("softcap", "sinks")  # in the names of attributes


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
            if why and any(names_beyond_sdpa(inside) for module in modules for inside in module.modules()):
                why += "; attnx.huggingface.use(model) makes it attend by attnx, which does"
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
    """Whether transformers says that the model which the module belongs to computes the same with SDPA's masks.

    None: the module is of no model that transformers knows.
    """
    if _is_pretrained(module):
        return bool(getattr(type(module), "_supports_sdpa", False))
    config = getattr(module, "config", None)
    return _source_supports_sdpa(type(module).__module__, type(config).__name__)


def asks_beyond_sdpa(module: nn.Module) -> list[str]:
    """Names of what the module asks of its attention function and SDPA can't give: soft capping, sinks."""
    if not names_beyond_sdpa(module):
        return []
    values = [name for name in _code(module).co_names if any(word in name for word in _BEYOND)]
    return [name for name in values if getattr(module, name, None) is not None]


def names_beyond_sdpa(module: nn.Module) -> bool:
    """Whether the module's code hands its attention function soft capping or sinks, if only None."""
    return not _keywords(_code(module)).isdisjoint(BEYOND_SDPA)


def asks_its_table(module: nn.Module) -> bool:
    """Whether the module's code looks its attention function up in transformers' table."""
    return "ALL_ATTENTION_FUNCTIONS" in _code(module).co_names


def _code(module: nn.Module) -> CodeType:
    """The code of the module's class's forward, whatever decorators are around it."""
    forward = unwrap(getattr(type(module), "forward", nn.Module.forward))
    return forward.__code__ if isinstance(forward, FunctionType) else _code.__code__


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
def _source_supports_sdpa(source: str, config: str) -> bool | None:
    """Of a module that is no model itself: what the models of the same file, or package, and configuration say."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return None
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
            return all(kind._supports_sdpa for kind in own or models)
    return None


@cache
def _keywords(code: CodeType) -> frozenset[str]:
    """Names of the keyword arguments in the calls that a function makes."""
    constants = [names for names in code.co_consts if isinstance(names, tuple)]
    return frozenset(name for names in constants for name in names if isinstance(name, str))
