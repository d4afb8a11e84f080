"""Facts about one attention call, from the module that makes it and from its arguments."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from attnx.trace.grids import Grid
from attnx.trace.layout import TokenLayout
from attnx.trace.tokens import Tokens, of_layout

if TYPE_CHECKING:
    from attnx.trace.windows import Windows

# Class names of modules that attend over the channels of [B, channels, tokens].
_CHANNELS = re.compile(r"channel.*att|xca$|cross.?cov", re.IGNORECASE)
# Class names of modules that attend to a feature map and, as token 0, to its mean or to a learned token.
_POOLS = re.compile("AttentionPool2d$", re.IGNORECASE)
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
    windows: the windows of the grid that its maps are of; None: it has none, or they are unknown.
    merges: number of patch mergings that ran before it in the pass.
    layouts: layouts that its tokens may have, because its input is a feature map, [B, C, h, w] or [B, h, w, C].
    """

    crosses: bool = False
    channels: bool = False
    width: int = 0
    windows: "Windows | None" = None
    merges: int = 0
    layouts: tuple[TokenLayout, ...] = ()

    def placed(self, tokens: Tokens, items: int, grids: Iterable[Grid]) -> Tokens:
        """The tokens with the grid of the layer's input, if exactly one layout fits; else unchanged.

        Args:
            tokens: of which no grid is known.
            items: number of maps.
            grids: of the modules outside attention that ran before. One of them must be of as many images, rows and
                columns: the two middle dims of an input may also be, for example, frames and tokens.
        """
        shapes = {grid.shape for grid in grids if grid.items == items}
        fitting = {x for x in self.layouts if x.tokens == tokens.count and x.grid in shapes}
        return of_layout(fitting.pop(), tokens.part) if len(fitting) == 1 else tokens


def facts_of(module: nn.Module, args: Any, kwargs: Mapping[str, Any], items: int) -> Facts:
    """The flags of a call with maps of `items` items, from the module's class and arguments."""
    kind: Any = type(module)
    if len(args) == 1 and not any(isinstance(value, Tensor) for value in kwargs.values()):
        x = args[0]  # most blocks have one input, [B, N, C]
        if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point():
            return Facts(channels=_over_channels(kind.__name__), width=x.shape[-1])
    named = dict(zip(parameters(kind), args, strict=False)) | dict(kwargs)
    floats = {name: t for name, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
    tokens = {name: t for name, t in floats.items() if t.dim() == 3}
    if not tokens:  # SAM's decoder attends over [B, prompts, N, C]
        tokens = {name: t for name, t in floats.items() if t.dim() == 4 and t.shape[:2].numel() == items}
    first = next(iter(tokens.values()), None)
    keys = next((tokens[name] for name in _KEYS if name in tokens), None)
    if keys is None:
        keys = next((t for name, t in tokens.items() if t is not first and not _NO_SOURCE.search(name)), first)
    width = 0 if first is None else first.shape[-1]
    batch = slice(1, 2) if getattr(module, "batch_first", True) is False else slice(0, -2)
    source = next(iter(floats.values()), None)
    layouts = () if source is None or len(source) != items else _layouts(kind.__name__, source.shape)
    crosses = first is not None and keys is not None and _other_source(first, keys, batch)
    return Facts(crosses, _over_channels(kind.__name__), width, layouts=layouts)


@lru_cache(1024)
def _over_channels(name: str) -> bool:
    """True for a class of this name that attends over channels."""
    return _CHANNELS.search(name) is not None


def _other_source(queries: Tensor, keys: Tensor, batch: slice) -> bool:
    """True if queries and keys are of the same items but of different tokens; `batch`: the dims of the items."""
    if keys is queries or keys.shape[batch].numel() != queries.shape[batch].numel():
        return False
    # 4-D inputs of equal length may be the queries and keys of one head.
    return queries.dim() == 3 or queries.shape[2] != keys.shape[2]


def _layouts(kind: str, shape: Sequence[int]) -> tuple[TokenLayout, ...]:
    """Layouts of a feature map's positions, for either order of its dims; none if the shape has not 4 dims."""
    if len(shape) != 4:
        return ()
    prefix = 1 if _POOLS.search(kind) else 0
    grids = {(shape[2], shape[3]), (shape[1], shape[2])}
    return tuple(TokenLayout(prefix, grid) for grid in grids if min(grid) > 1)


def parameters(kind: Any) -> tuple[str, ...]:
    """Names of the positional arguments of a module class's forward."""
    if kind not in _PARAMETERS:
        try:
            _PARAMETERS[kind] = tuple(signature(kind.forward).parameters)[1:]
        except (TypeError, ValueError):
            _PARAMETERS[kind] = ()
    return _PARAMETERS[kind]
