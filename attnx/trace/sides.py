"""The tokens of the rows and columns of a map, and the part of the model that they belong to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from attnx.trace.branch_layers import BranchLayer, branch_layer, branch_layout
from attnx.trace.layers import attention_layers, clean_name
from attnx.trace.layout import Grid, TokenLayout, declared_prefix, grid_modules, patch_convolutions
from attnx.trace.windows import Windows

# Class names of modules that attend over the channels of [B, channels, tokens].
_CHANNELS = re.compile(r"channel.*att|xca$|cross.?cov", re.IGNORECASE)
# Names of word embeddings, as opposed to those of positions, types or queries.
_WORDS = re.compile(r"(word_emb\w*|token_emb\w*|tok_emb\w*|embed_tokens|wte|shared)$")
# Names of embeddings of something else than words: beside others, the part's tokens are not surely patches.
_NO_WORDS = re.compile(r"pos|quer|type|seg|level|label|class|time|rel|bias|row|col", re.IGNORECASE)
# Names of cross-attention layers. Self-attention beside one, in a decoder's block, has queries as tokens.
_CROSS = re.compile(r"cross|^enc\w*att|^multihead_attn$", re.IGNORECASE)
# Names of arguments that hold the source of the keys in cross-attention.
_KEYS = ("key", "keys", "k_x", "key_value_states")
# Names of arguments that have the shape of tokens and are not the source of the keys.
_NO_SOURCE = re.compile(r"pos|rope|rot|mask|bias|freq|value|v_x|gate|residual|scale|output|cls", re.IGNORECASE)
_PARAMETERS: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # argument names of each class's forward


@dataclass(frozen=True)
class Tokens:
    """The tokens on one side of a map.

    Attributes:
        kind: "image", "text", "windows" (the tokens of one window of an image: an item of the batch has several maps),
            "channels" (features instead of tokens), "queries" (learned, or from another layer), or "tokens" if their
            kind is unknown.
        prefix, grid: as in `TokenLayout`, for an image; grid is None if the tokens do not fill a grid of patches. For
            windows it is the grid of the whole image, and None if that is unknown.
        count: number of tokens.
        cls: True if token 0 is a class token.
        part: name of the part of the model that the tokens belong to, such as "vision_model"; "" if there is one part.
        frames: as in `TokenLayout`, for a video.
    """

    kind: str
    prefix: int = 0
    grid: tuple[int, int] | None = None
    count: int = 0
    cls: bool = False
    part: str = ""
    frames: int = 1

    @property
    def layout(self) -> TokenLayout | None:
        """Prefix and grid as a `TokenLayout`; None if there is no grid."""
        if self.grid is None or self.kind == "windows":
            return None
        return TokenLayout(self.prefix, self.grid, self.cls, self.frames)

    def __str__(self) -> str:
        if self.kind == "windows":
            grid = f" of {self.grid[0]} x {self.grid[1]}" if self.grid else ""
            return f"windows of {self.count}{grid} tokens" + (f" of {self.part}" if self.part else "")
        return f"{self.count} {self.kind}" + (f" of {self.part}" if self.part else "")


class Facts(NamedTuple):
    """Flags of one attention call.

    crosses: its keys come from another source than its queries.
    channels: it attends over channels.
    width: number of features of its input tokens; 0 if unknown.
    items: number of maps, windows included; 0 if unknown.
    windows: the windows of the grid that its maps are of; None: it has none, or attnx does not know them.
    merges: number of patch mergings that ran before it in the pass.
    """

    crosses: bool = False
    channels: bool = False
    width: int = 0
    items: int = 0
    windows: Windows | None = None
    merges: int = 0


def facts_of(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Facts:
    """The flags of a call, from the module's class and arguments."""
    kind: Any = type(module)
    named = dict(zip(_parameters(kind), args, strict=False)) | dict(kwargs)
    tokens = {name: t for name, t in named.items() if isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 3}
    first = next(iter(tokens.values()), None)
    keys = next((tokens[name] for name in _KEYS if name in tokens), None)
    if keys is None:
        keys = next((t for name, t in tokens.items() if t is not first and not _NO_SOURCE.search(name)), first)
    crosses = keys is not first and first is not None and keys is not None and len(keys) == len(first)
    width = 0 if first is None else first.shape[-1]
    return Facts(crosses, _CHANNELS.search(kind.__name__) is not None, width)


class Parts:
    """The parts of a model that have their own tokens, found by its patch convolutions and word embeddings.

    Args:
        model: any model.
        layers: names of attention layers, in addition to those recognised by `attention_layers`.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        self.modules = {clean_name(name): module for name, module in model.named_modules()}
        attending = {*layers, *attention_layers(model)}
        inside = {name.rsplit(".", i)[0] for name in attending for i in range(1, name.count(".") + 1)} | {""}
        convolutions = {id(module) for module in patch_convolutions(model)}
        self.kinds: dict[str, dict[str, str]] = {}  # {part: {module: kind of tokens}}
        # Blocks with cross-attention: their self-attention is over queries.
        self.decoders = {name.rpartition(".")[0] for name in attending if _CROSS.search(name.rpartition(".")[2])}
        self._declared: dict[str, tuple[int, bool] | None] = {}
        for name, module in self.modules.items():
            if id(module) in convolutions:
                kind = "image"
            elif isinstance(module, nn.Embedding) and _WORDS.search(name):
                kind = "text"
            else:
                continue
            if self._in_layer(name, attending):
                continue  # it reduces the keys of that layer
            around = name.rpartition(".")[0]
            while around not in inside:
                around = around.rpartition(".")[0]
            self.kinds.setdefault(around, {})[name] = kind
        sources = {id(module) for module in grid_modules(model)}
        # {module that may have the grid of tokens: part}
        self.sources = {
            name: self.of(name)
            for name, module in self.modules.items()
            if id(module) in sources and not self._in_layer(name, attending)
        }
        # Parts with words, or embeddings that may be of words: a sequence of as many words would pass for an image.
        self.with_words = {
            self.of(name)
            for name, module in self.modules.items()
            if isinstance(module, nn.Embedding) and (_WORDS.search(name) or not _NO_WORDS.search(name))
        }

    @staticmethod
    def _in_layer(name: str, attending: Iterable[str]) -> bool:
        return any(name.startswith(layer + ".") for layer in attending)

    def of(self, layer: str) -> str:
        """Name of the innermost part around a layer; "" if there is none."""
        around = [part for part in self.kinds if not part or layer == part or layer.startswith(part + ".")]
        return max(around, key=len, default="")

    def kind(self, part: str) -> str:
        """Kind of a part's tokens: "image" or "text"; "tokens" if the part has both or neither."""
        kinds = set(self.kinds.get(part, {}).values())
        return kinds.pop() if len(kinds) == 1 else "tokens"

    def grids(self, part: str, grids: Mapping[str, Grid], width: int) -> list[Grid]:
        """Grids that a part's tokens may have.

        These are the grids of its patch convolutions, and that of the last module before the layer which may have the
        grid of tokens, with as many channels as the tokens. None if the part has words.

        Args:
            part: name of the part.
            grids: {module: grid} of the modules that ran before the layer, the newest first.
            width: number of features of a token; 0 if unknown.
        """
        if part in self.with_words:
            return []
        patches = [grid for name, grid in grids.items() if self.kinds.get(part, {}).get(name) == "image"]
        last = (g for name, g in grids.items() if self.sources.get(name) == part and g.channels == width and width)
        return [*patches, *(grid for grid in [next(last, None)] if grid is not None)]

    def is_split(self, part: str, grids: Mapping[str, Grid], items: int) -> bool:
        """True if a layer of the part has several maps for each image: it attends in windows."""
        images = next((grid.items for name, grid in grids.items() if self.sources.get(name) == part), 0)
        return images > 0 and items > images and items % images == 0

    def layout(self, part: str, grids: Mapping[str, Grid], count: int, width: int) -> TokenLayout | None:
        """Layout of an image part's tokens; None unless prefix and exactly one grid add up to `count`."""
        if part not in self._declared:
            self._declared[part] = declared_prefix(self.modules[part]) or declared_prefix(self.modules[""])
        declared = self._declared[part]
        if declared is None:
            return None
        prefix, cls = declared
        fitting = {
            (g.shape, g.frames) for g in self.grids(part, grids, width) if g.tokens and prefix + g.tokens == count
        }
        if len(fitting) != 1:
            return None
        shape, frames = fitting.pop()
        return TokenLayout(prefix, shape, cls, frames)

    def tokens(self, part: str, grids: Mapping[str, Grid], count: int, width: int) -> Tokens:
        """`count` tokens of a part."""
        kind = self.kind(part)
        layout = self.layout(part, grids, count, width) if kind != "text" else None
        return Tokens(kind, count=count, part=part) if layout is None else of_layout(layout, part)


def sides(
    parts: Parts, layer: str, size: tuple[int, int], facts: Facts, grids: Mapping[str, Grid]
) -> tuple[Tokens, Tokens]:
    """(queries, keys) of a layer's map with size = (rows, columns).

    Args:
        parts, facts: of the model and of the layer's call.
        layer, size: name of the layer, and (rows, columns) of its map.
        grids: {module: grid} of the modules that ran before the layer, the newest first.
    """
    layer = layer.partition("#")[0]
    part, (rows, columns), width = parts.of(layer), size, facts.width
    if facts.windows is not None:
        tokens = Tokens("windows", grid=facts.windows.grid, count=columns, part=part)
        return tokens, tokens
    if facts.channels:
        return Tokens("channels", count=rows, part=part), Tokens("channels", count=columns, part=part)
    if (branch := branch_layer(parts.modules, layer)) is not None:
        return _of_branch(parts, branch, columns, grids)
    if facts.crosses:
        return _crossing(parts, part, size, width, grids)
    keys = parts.tokens(part, grids, columns, width)
    if keys.grid is None and keys.kind == "image" and parts.is_split(part, grids, facts.items):
        return Tokens("windows", count=rows, part=part), Tokens("windows", count=columns, part=part)
    if rows == columns:
        in_decoder = layer.rpartition(".")[0] in parts.decoders and not _CROSS.search(layer.rpartition(".")[2])
        if in_decoder and keys.kind != "text":
            keys = Tokens("queries", count=columns, part=part)
        return keys, keys
    if keys.kind == "text":
        return Tokens("text", count=rows, part=part), keys
    queries = parts.tokens(part, grids, rows, width)
    return queries if rows > 1 and queries.grid else Tokens("queries", count=rows, part=part), keys


def _crossing(
    parts: Parts, part: str, size: tuple[int, int], width: int, grids: Mapping[str, Grid]
) -> tuple[Tokens, Tokens]:
    """(queries, keys) of a layer in a part whose keys come from another source than its queries."""
    rows, columns = size
    candidates = [parts.tokens(other, grids, columns, width) for other in dict.fromkeys([*parts.kinds, part])]
    images = [tokens for tokens in candidates if tokens.grid]
    texts = [tokens for tokens in candidates if tokens.kind == "text" and tokens.part != part]
    own = [tokens for tokens in images if tokens.part == part]
    known = own or (images if len(images) == 1 else []) or texts[:1]
    if rows == 1:
        # The single query of a pooling layer over the tokens of the layers before it.
        keys = known[0] if known else parts.tokens(part, grids, columns, width)
        return Tokens("queries", count=1, part=part), keys
    keys = known[0] if known else Tokens("tokens", count=columns, part="elsewhere")
    queries = parts.tokens(part, grids, rows, width)
    if queries.kind == "tokens" or queries == keys:
        return Tokens("queries", count=rows, part=part), keys
    return queries, keys


def _of_branch(parts: Parts, layer: BranchLayer, count: int, grids: Mapping[str, Grid]) -> tuple[Tokens, Tokens]:
    """(queries, keys) of a layer of CrossViT with `count` keys."""
    part, own = layer.part(layer.keys), Tokens("queries", count=1, part=layer.part(layer.branch))
    layout = branch_layout(parts.modules, layer, grids, count)
    keys = Tokens("image", count=count, part=part) if layout is None else of_layout(layout, part)
    return (keys if layer.fusion is None else own), (own if layer.fusion else keys)


def of_layout(layout: TokenLayout, part: str) -> Tokens:
    """The tokens of an image with the given layout."""
    return Tokens("image", layout.prefix, layout.grid, layout.tokens, layout.cls is True, part, layout.frames)


def stack_of(layer: str) -> str:
    """Name of the stack of blocks around a layer: "encoder.layer" for "encoder.layer.3.attention"."""
    stem = re.match(r"(.*?)\d+(?=[.#]|$)", layer)
    return "" if stem is None else stem[1].rstrip(".")


def describe(sides_of: Mapping[str, tuple[Tokens, Tokens]], by_stack: bool = False) -> str:
    """Layers in words, grouped by the tokens of their maps: "12 text of text_model: text_model.layers.0".

    Args:
        sides_of: {layer: (queries, keys)}.
        by_stack: group by the stack of blocks, too.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for layer, (queries, keys) in sides_of.items():
        tokens = f"{queries} over {keys}" if queries != keys else f"{keys}"
        groups.setdefault((tokens, stack_of(layer) if by_stack else ""), []).append(layer)
    return "; ".join(
        f"{tokens}: {names[0]}" + (f" ... {names[-1]} ({len(names)} layers)" if len(names) > 1 else "")
        for (tokens, _), names in groups.items()
    )


def _parameters(kind: Any) -> tuple[str, ...]:
    """Names of the positional arguments of a module class's forward."""
    if kind not in _PARAMETERS:
        try:
            _PARAMETERS[kind] = tuple(signature(kind.forward).parameters)[1:]
        except (TypeError, ValueError):
            _PARAMETERS[kind] = ()
    return _PARAMETERS[kind]
