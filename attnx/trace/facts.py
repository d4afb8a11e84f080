"""Facts about one attention call, from the module that makes it and from its arguments."""

import re
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

if TYPE_CHECKING:
    from attnx.trace.windows import Windows

# Class names of modules that attend over the channels of [B, channels, tokens].
_CHANNELS = re.compile(r"channel.*att|xca$|cross.?cov", re.IGNORECASE)
# Names of arguments that hold the source of the keys in cross-attention.
_KEYS = ("key", "keys", "k_x", "key_value_states")
# Names of arguments that have the shape of tokens and are not the source of the keys.
_NO_SOURCE = re.compile(r"pos|rope|rot|mask|bias|freq|value|v_x|gate|residual|scale|output|cls", re.IGNORECASE)
_PARAMETERS: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # argument names of each class's forward


class Facts(NamedTuple):
    """Flags of one attention call.

    crosses: its keys come from another source than its queries.
    channels: it attends over channels.
    width: number of features of its input tokens; 0 if unknown.
    items: number of maps, windows included; 0 if unknown.
    windows: the windows of the grid that its maps are of; None: it has none, or they are unknown.
    merges: number of patch mergings that ran before it in the pass.
    """

    crosses: bool = False
    channels: bool = False
    width: int = 0
    items: int = 0
    windows: "Windows | None" = None
    merges: int = 0


def facts_of(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Facts:
    """The flags of a call, from the module's class and arguments."""
    kind: Any = type(module)
    named = dict(zip(parameters(kind), args, strict=False)) | dict(kwargs)
    tokens = {name: t for name, t in named.items() if isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 3}
    first = next(iter(tokens.values()), None)
    keys = next((tokens[name] for name in _KEYS if name in tokens), None)
    if keys is None:
        keys = next((t for name, t in tokens.items() if t is not first and not _NO_SOURCE.search(name)), first)
    crosses = keys is not first and first is not None and keys is not None and len(keys) == len(first)
    width = 0 if first is None else first.shape[-1]
    return Facts(crosses, _CHANNELS.search(kind.__name__) is not None, width)


def parameters(kind: Any) -> tuple[str, ...]:
    """Names of the positional arguments of a module class's forward."""
    if kind not in _PARAMETERS:
        try:
            _PARAMETERS[kind] = tuple(signature(kind.forward).parameters)[1:]
        except (TypeError, ValueError):
            _PARAMETERS[kind] = ()
    return _PARAMETERS[kind]
