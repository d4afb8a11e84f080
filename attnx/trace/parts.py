"""The parts of a model that have their own tokens: an image encoder, a text encoder."""

import re
from collections.abc import Iterable, Mapping
from copy import copy
from weakref import WeakValueDictionary

from torch import nn

from attnx.trace.grids import Grid, is_grid_module, is_patch_convolution
from attnx.trace.layers import attending_names
from attnx.trace.layout import Declared, TokenLayout, declared_tokens
from attnx.trace.structure import Structure
from attnx.trace.tokens import Tokens, of_layout

# Names of word embeddings, as opposed to those of positions, types or queries.
_WORDS = re.compile(r"(word_emb\w*|token_emb\w*|tok_emb\w*|embed_tokens|wte|shared)$")
# Names of embeddings of something else than words: beside others, the part's tokens are not surely patches.
_NO_WORDS = re.compile(r"pos|quer|type|seg|level|label|class|time|rel|bias|row|col", re.IGNORECASE)
# The same, at the end of a name only: embeddings of SAM's prompts and masks.
_PROMPTS = re.compile(r"(point|mask|iou|obj)\w*$", re.IGNORECASE)
# Names of cross-attention layers. Self-attention beside one, in a decoder's block, has queries as tokens.
CROSS = re.compile(r"cross|^enc\w*att|^multihead_attn$", re.IGNORECASE)


class Parts:
    """The parts of a model that have their own tokens, found by its patch convolutions and word embeddings.

    Args:
        structure: of any model.
        layers: names of attention layers, in addition to those recognised by `attention_layers`.
    """

    def __init__(self, structure: Structure, layers: Iterable[str]) -> None:
        self.modules: Mapping[str, nn.Module] = WeakValueDictionary(structure.named_modules())
        self.attending = attending = {*layers, *structure.derived(attending_names)}
        inside = {name.rsplit(".", i)[0] for name in attending for i in range(1, name.count(".") + 1)} | {""}
        convolutions = {id(module) for _, module in structure.where(is_patch_convolution)}
        self.kinds: dict[str, dict[str, str]] = {}  # {part: {module: kind of tokens}}
        # Blocks with cross-attention: their self-attention is over queries.
        self.decoders = {name.rpartition(".")[0] for name in attending if CROSS.search(name.rpartition(".")[2])}
        self._declared: dict[str, Declared | None] = {}
        self._tokens: dict[tuple[str, int, int], tuple[Mapping[str, Grid], Tokens]] = {}
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
        self._of: dict[str, str] = {}  # {layer: its part}
        grids = {id(module) for _, module in structure.where(is_grid_module)}
        sources = [n for n, m in self.modules.items() if id(m) in grids and not self._in_layer(n, attending)]
        # Beside words, a module with convolutions and attention is a part of its own: the ResNet of CLIP.
        for part in [part for part in self.kinds if self.kind(part) == "text"]:
            words, attend, convolve = (_children(part, names) for names in (self.kinds[part], attending, sources))
            self.kinds |= {child: {} for child in (attend & convolve) - words - self.kinds.keys()}
        self.sources = {name: self.of(name) for name in sources}  # {module that may have the grid of tokens: part}
        # Parts with words, or embeddings that may be of words: as many words as positions could be taken for patches.
        self.with_words = {
            self.of(name)
            for name, module in self.modules.items()
            if isinstance(module, nn.Embedding)
            and (_WORDS.search(name) or not (_NO_WORDS.search(name) or _PROMPTS.search(name)))
        }

    def for_one_trace(self) -> "Parts":
        """The same parts, without what a model declared: its attributes may have changed."""
        other = copy(self)
        other._declared, other._tokens = {}, {}
        return other

    @staticmethod
    def _in_layer(name: str, attending: Iterable[str]) -> bool:
        return any(name.startswith(layer + ".") for layer in attending)

    def of(self, layer: str) -> str:
        """Name of the innermost part around a layer; "" if there is none."""
        if layer not in self._of:
            around = [part for part in self.kinds if not part or layer == part or layer.startswith(part + ".")]
            self._of[layer] = max(around, key=len, default="")
        return self._of[layer]

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

    def features(self, grids: Mapping[str, Grid], count: int, width: int) -> list[Tokens]:
        """The positions of a convolution's output, if exactly one grid has `count` of them and `width` channels.

        Empty if a part has words: there may be as many of them.
        """
        if self.with_words or not width:
            return []
        fitting = Declared(0, False).layouts((g for g in self.outside(grids) if g.channels == width), count)
        return [of_layout(layout, "") for layout in fitting] if len(fitting) == 1 else []

    def outside(self, grids: Mapping[str, Grid]) -> list[Grid]:
        """The grids of modules outside attention layers."""
        return [grid for name, grid in grids.items() if name in self.sources]

    def declares(self, part: str) -> bool:
        """True if a part, or the model, declares its prefix tokens."""
        return self._declared.get(part) is not None

    def is_split(self, part: str, grids: Mapping[str, Grid], items: int) -> bool:
        """True if a layer of the part has several maps for each image: it attends in windows."""
        if part in self.with_words:
            return False  # there may be several texts for each image
        images = next((grid.items for name, grid in grids.items() if self.sources.get(name) == part), 0)
        return images > 0 and items > images and items % images == 0

    def layout(self, part: str, grids: Mapping[str, Grid], count: int, width: int) -> TokenLayout | None:
        """Layout of an image part's tokens; None unless exactly one grid gives `count` tokens."""
        if part not in self._declared:
            self._declared[part] = declared_tokens(self.modules[part]) or declared_tokens(self.modules[""])
        # Without a declaration there is no prefix if the tokens are as many as the grid has positions.
        declared = self._declared[part] or Declared(0, False)
        fitting = declared.layouts(self.grids(part, grids, width), count)
        return fitting.pop() if len(fitting) == 1 else None

    def tokens(self, part: str, grids: Mapping[str, Grid], count: int, width: int) -> Tokens:
        """`count` tokens of a part."""
        # Layers of one stack have the same grids, in one mapping that is not changed.
        found = self._tokens.get((part, count, width))
        if found is None or found[0] is not grids:
            kind = self.kind(part)
            layout = self.layout(part, grids, count, width) if kind != "text" else None
            tokens = Tokens(kind, count=count, part=part) if layout is None else of_layout(layout, part)
            found = self._tokens[part, count, width] = grids, tokens
        return found[1]


def _children(part: str, names: Iterable[str]) -> set[str]:
    """Names of the direct children of a part that are, or hold, modules of `names`."""
    start = f"{part}." if part else ""
    return {start + name[len(start) :].partition(".")[0] for name in names if name.startswith(start)}
